"""Models that no row of families.py names: their parts are found, checked against the model itself, or refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, CompressedTensorsConfig

import lfq_lightning
from lfq_lightning.errors import UserError
from lfq_lightning.models import streamed
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.discover import discover
from lfq_lightning.models.experts import ExpertList, split_experts
from lfq_lightning.models.families import FAMILIES
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.packed.export import export
from tests.helpers import EXTRA, GPTQ, SHAPE, fails, run, save_tiny, save_with_images

UNLISTED = ("phi3", "stablelm", "opt", "youtu", "minimax_m2", "gpt_neox")
HANDING_ON = ("bloom", "gemma4_text", "glm_moe_dsa", "llama4_text")  # more than hidden states, or other experts
IDS = torch.arange(40)[None] * 7 % 256


def tiny_config(family):
    return AutoConfig.for_model(family, **{**SHAPE, **EXTRA.get(family, {}), "tie_word_embeddings": False})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_is_what_the_table_says(family):
    config, row = tiny_config(family), FAMILIES[family]
    found = discover(config, family)
    for part in ("decoder", "blocks", "norm", "head", "embeddings"):
        assert getattr(found, part) == getattr(row, part), part
    (scale, cap), (expected, bound) = found.terms, row.logit_terms(config.to_dict())
    assert scale == pytest.approx(expected, rel=1e-5) and cap == bound


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in UNLISTED), ("olmo2", torch.bfloat16)]
)
def test_streamed_logits_are_the_models_own(tmp_path, family, dtype):
    folder = save_tiny(tmp_path / family, family, tied=False, dtype=dtype)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = own(input_ids=IDS).logits
    found = lfq_lightning.streamed_logits(folder, IDS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("family", HANDING_ON)
def test_what_layers_hand_on_travels(tmp_path, family):
    """For sequences that differ, of another number than the arguments were captured with."""
    folder = save_tiny(tmp_path / family, family, tied=False)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = own(input_ids=ids).logits
    found = lfq_lightning.streamed_logits(folder, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.std()))


@pytest.mark.parametrize("family", [*UNLISTED, *HANDING_ON])
def test_quantised_and_read_by_transformers(config, tmp_path, family):
    folder = save_tiny(tmp_path / family, family, tied=False)
    path = config(model={"checkpoint": str(folder)}, plan=[{"match": "all", "quantizer": GPTQ}])
    run(path)
    packed = path.parent / "run"
    plain = AutoModelForCausalLM.from_pretrained(packed, quantization_config=CompressedTensorsConfig(dequantize=True))
    ours, _ = lfq_lightning.load(packed, dequantize=True)
    with torch.no_grad():
        theirs = plain.float().eval()(input_ids=IDS).logits
        torch.testing.assert_close(ours.float()(input_ids=IDS).logits, theirs, rtol=0, atol=1e-4 * float(theirs.std()))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", r"nothing in its layers is a linear layer that can be packed \(.*c_.*.weight\)"),
        ("falcon", "nothing in its layers is a linear layer that can be packed"),
        ("t5", "transformers has no class for it that writes text"),
        ("bert", "does more between decoder and logits than a linear head does"),
    ],
)
def test_others_are_refused_in_one_sentence(family, reason):
    settings = {"t5": {}, "falcon": {"num_hidden_layers": 2}}.get(family, SHAPE)
    with pytest.raises(UserError, match=reason):
        discover(AutoConfig.for_model(family, **settings), family)


def test_wrong_streams_are_refused_before_any_work(config, tmp_path, monkeypatch, capsys):
    folder = save_tiny(tmp_path / "olmo2", "olmo2", tied=False)
    right = streamed._streamed
    monkeypatch.setattr(streamed, "_streamed", lambda *given, **options: 1.01 * right(*given, **options))
    message = fails(capsys, "run", "--config", str(config(model={"checkpoint": str(folder)})))
    assert "model type 'olmo2' is not streamed right" in message
    assert not (tmp_path / "run").exists()


def test_a_layer_whose_weight_is_read_is_kept(tmp_path):
    """By the initialisation of nanochat, which transformers runs after it has loaded packed layers."""
    folder = save_tiny(tmp_path / "nanochat", "nanochat", tied=False)
    checkpoint = open_checkpoint(str(folder))
    streamed.check_streams(checkpoint)
    skeleton = ModelSkeleton(checkpoint)
    layers = {name.rpartition(".")[2] for name in skeleton.linear_shapes(0)}
    assert layers == {"q_proj", "k_proj", "v_proj", "fc1", "fc2"}
    assert skeleton.routers()[0] == "model.layers.0.self_attn.o_proj"


def test_a_model_that_runs_in_loops_is_refused(tmp_path):
    settings = {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 1}
    folder = save_tiny(tmp_path / "dory", "dory", tied=False, layer_types=["full_attention"] * 3, **settings)
    with pytest.raises(UserError, match="some of its layers are called more than once"):
        streamed.check_streams(open_checkpoint(str(folder)))


def test_a_model_whose_packed_layers_transformers_cannot_load_is_refused(tmp_path):
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "rg", "recurrent_gemma", tied=True)))
    with pytest.raises(UserError, match=r"'recurrent_gemma' cannot be streamed .*has no attribute 'weight'"):
        streamed.check_streams(checkpoint)


def test_a_model_that_sees_what_follows_is_refused(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "llama", tied=False)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "is_causal": False}))
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(UserError, match="is no decoder: its tokens see those behind them"):
        streamed.check_streams(checkpoint)


def test_a_long_model_is_checked_on_one_layer_of_every_kind():
    settings = {**SHAPE, "num_hidden_layers": 12, "layer_types": ["linear_attention"] * 5 + ["full_attention"] * 7}
    short, layers = streamed._shortened(AutoConfig.for_model("llama", **settings), 12)
    assert layers == short.num_hidden_layers == 6 and len(short.layer_types) == 6


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_the_text_part_of_a_model_with_images_is_quantised_and_the_rest_ships_as_it_was(config, tmp_path, family):
    folder = save_with_images(tmp_path / family, family)
    (folder / "preprocessor_config.json").write_text('{"image_size": 28}')
    auto = AutoModelForImageTextToText
    own = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = own(input_ids=IDS).logits
    found = lfq_lightning.streamed_logits(folder, IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))

    path = config(model={"checkpoint": str(folder)}, plan=[{"match": "all", "quantizer": GPTQ}])
    run(path)
    packed = path.parent / "run"
    plain = auto.from_pretrained(packed, quantization_config=CompressedTensorsConfig(dequantize=True)).float().eval()
    assert type(plain) is type(own)
    assert (packed / "preprocessor_config.json").read_text() == '{"image_size": 28}'
    ours, _ = lfq_lightning.load(packed, dequantize=True)
    with torch.no_grad():
        theirs = plain(input_ids=IDS).logits
        torch.testing.assert_close(ours.float()(input_ids=IDS).logits, theirs, rtol=0, atol=1e-4 * float(theirs.std()))
    after = dict(plain.named_parameters())
    for name, parameter in own.named_parameters():
        quantised = ".language_model.layers." in name and name.endswith("proj.weight")
        assert torch.equal(parameter, after[name]) != quantised, name


@pytest.mark.parametrize("family", ["qwen2_moe", "minimax_m2"])
def test_experts_compute_what_the_models_own_do(tmp_path, family):
    config = tiny_config(family)
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(config).eval()
    fused = next(module for name, module in own.named_modules() if name.endswith(".experts"))
    split = copy.deepcopy(own)
    split_experts(split)
    ours = next(module for module in split.modules() if isinstance(module, ExpertList))
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_()
        for number, expert in enumerate(ours):
            gate, up = fused.gate_up_proj[number].chunk(2)
            for name, weight in zip(expert.names, (gate, up, fused.down_proj[number]), strict=True):
                expert.get_submodule(name).weight.copy_(weight)
        hidden = torch.randn(50, 32)
        chosen = torch.stack([torch.randperm(4)[:2] for _ in range(50)])
        weights = torch.rand(50, 2)
        expected = fused(hidden, chosen, weights)
        torch.testing.assert_close(ours(hidden, chosen, weights), expected, rtol=1e-4, atol=1e-3)


def test_names_on_disk_are_those_that_transformers_writes(tmp_path):
    family = discover(tiny_config("minimax_m2"), "it")
    here, there = "model.layers.1.mlp.experts.2.w1", "model.layers.1.block_sparse_moe.experts.2.w1"
    assert family.stored_layer(here) == there and family.model_layer(there) == here
    assert family.stored_name(f"{here}.weight_packed") == f"{there}.weight_packed"
    assert family.model_name(f"{there}.weight_packed") == f"{here}.weight_packed"
    assert discover(tiny_config("gpt_neox"), "it").ignored(["lm_head"]) == ["embed_out", "lm_head"]


def test_what_transformers_passes_over_ships_as_it_was(config, tmp_path):
    """Such as a head that predicts one token more; vLLM loads it, by the names of the layers that are not packed."""
    folder = save_tiny(tmp_path / "qwen3_next", "qwen3_next", tied=False)
    stored = load_file(folder / "model.safetensors")
    extra = {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.randn(32)}
    save_file(stored | extra, folder / "model.safetensors", {"format": "pt"})
    path = config(model={"checkpoint": str(folder)}, plan=[{"match": "all", "quantizer": {**GPTQ, "bits": 4}}])
    run(path)
    packed = path.parent / "run"
    lfq_lightning.load(packed)
    export(str(packed), "gptq", str(tmp_path / "gptq"))
    for output in (packed, tmp_path / "gptq"):
        shipped = load_file(sorted(output.glob("*.safetensors"))[0])
        assert all(torch.equal(shipped[name], tensor) for name, tensor in extra.items())
    assert "mtp.fc" in json.loads((packed / "config.json").read_text())["quantization_config"]["ignore"]
