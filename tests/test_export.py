"""Packed folders: converting, inspecting, loading, talking; and damage."""

import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, pipeline

import lfq_lightning
from lfq_lightning.cli import main
from lfq_lightning.engines import fused_differently
from lfq_lightning.errors import UserError
from lfq_lightning.export import export
from lfq_lightning.load_model import load
from lfq_lightning.packed_folder import PackedFolder
from lfq_lightning.packed_linear import PackedLinear
from lfq_lightning.quant_scheme import QuantScheme
from tests.conftest import save_tiny

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def quantizer(bits, group_size=32, symmetric=True):
    return {"name": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric}


@pytest.fixture
def packed(config, tmp_path):
    """Return a function that quantises a tiny model by rtn and returns the run's folder."""

    def make(plan, tied=True, dtype=torch.float16, family="llama", chat=False, overwrite=False):
        model = save_tiny(tmp_path / "model", family, tied=tied, chat=chat, dtype=dtype, **WIDE)
        (model / "LICENSE").write_text("as you like")
        main(["run", "--config", str(config(model={"checkpoint": str(model)}, plan=plan, overwrite=overwrite))])
        return tmp_path / "run"

    return make


CASES = {
    **{f"gptq w{bits}": ("gptq", quantizer(bits)) for bits in (2, 3, 4, 8)},
    **{f"gptq_v2 w{bits} asymmetric": ("gptq_v2", quantizer(bits, symmetric=False)) for bits in (2, 3, 4, 8)},
    "gptq_v2 per channel": ("gptq_v2", quantizer(4, -1)),
    "awq": ("awq", quantizer(4, symmetric=False)),
    "awq symmetric": ("awq", quantizer(4, 16)),
    "awq, folded by awq": ("awq", {**quantizer(4, symmetric=False), "name": "awq"}),
    "compressed-tensors": ("compressed-tensors", quantizer(5)),
}


@pytest.mark.parametrize("case", CASES)
def test_export_keeps_every_weight(case, packed, tmp_path, capsys):
    name, scheme = CASES[case]
    run = packed([{"match": "all", "quantizer": scheme}], tied=name != "awq")
    main(["export", str(run), "--format", name, "--output", str(tmp_path / "new")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "new")
    before, after = (load(folder, dequantize=True)[0].state_dict() for folder in (run, tmp_path / "new"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    for file in ("LICENSE", "README.md", "metrics.json", "lfq.yaml"):
        assert (tmp_path / "new" / file).is_file()
    assert not (tmp_path / "new" / "journal.jsonl").exists()
    text = "a few words"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (run, tmp_path / "new")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    main(["export", str(tmp_path / "new"), "--format", "compressed-tensors", "--output", str(tmp_path / "back")])
    back = load(tmp_path / "back", dequantize=True)[0].state_dict()
    assert all(torch.equal(value, back[key]) for key, value in before.items())


def test_mixed_schemes_and_dense_layers_go_to_gptq(packed, tmp_path):
    plan = [
        {"match": "*.0.mlp.down_proj", "quantizer": quantizer(8)},
        {"match": ["*.q_proj", "*.k_proj", "*.v_proj", "*.mlp.*"], "quantizer": quantizer(4)},
    ]
    run = packed(plan)
    main(["export", str(run), "--format", "gptq_v2", "--output", str(tmp_path / "new")])
    before, after = PackedFolder(run), PackedFolder(tmp_path / "new")
    assert before.schemes == after.schemes
    assert before.dense == after.dense and "model.layers.2.self_attn.o_proj" in after.dense
    for a, b in zip(before.shards(), after.shards(), strict=True):
        assert a.layers.keys() == b.layers.keys()
        assert all(torch.equal(a.layers[n].dequantize(), b.layers[n].dequantize()) for n in a.layers)
    with pytest.raises(UserError, match="8 bits, but awq holds 4 only"):
        export(str(run), "awq", str(tmp_path / "awq"))


def test_a_refused_export_leaves_nothing(packed, tmp_path):
    run = packed([{"match": "all", "quantizer": quantizer(3, symmetric=False)}])
    with pytest.raises(UserError, match="zero point of 0"):
        export(str(run), "gptq", str(tmp_path / "new"))
    with pytest.raises(UserError, match="unknown format 'gtpq': did you mean 'gptq'"):
        export(str(run), "gtpq", str(tmp_path / "new"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml", "model", "run"]
    with pytest.raises(UserError, match="exists; give a new folder"):
        export(str(run), "gptq_v2", str(run))
    with pytest.raises(UserError, match="cannot be written"):
        export(str(run), "gptq_v2", str(tmp_path / "config.yaml" / "new"))
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match=r"new\.partial is left of an export"):
        export(str(run), "gptq_v2", str(tmp_path / "new"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 has biases
def test_packed_layers_compute_what_dense_ones_do(family, dtype, packed):
    run = packed([{"match": "all", "quantizer": quantizer(3)}], dtype=dtype, family=family, tied=False)
    ours, dense = lfq_lightning.load(run)[0], load(run, dequantize=True)[0]
    assert sum(isinstance(module, PackedLinear) for module in ours.modules()) == 21
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = [model(tokens).logits.float() for model in (ours, dense)]
        exact = dense.float()(tokens).logits
    errors = [float((value - exact).norm() / exact.norm()) for value in logits]
    assert errors[0] <= 1.5 * errors[1] + 1e-6  # as far from fp32 as the dense model in its own dtype
    output = ours.generate(tokens[:, :5], do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert output.shape == (1, 9)
    speaker = pipeline("text-generation", model=ours, tokenizer=AutoTokenizer.from_pretrained(run))
    assert speaker("ab", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("ab")


def test_a_layer_spread_over_two_shards(packed, tmp_path):
    """As tools that cut shards by size leave it."""
    run = packed([{"match": "all", "quantizer": quantizer(3)}])
    wanted = load(run, dequantize=True)[0].state_dict()
    first, second = (load_file(run / f"model-0000{i}-of-00004.safetensors") for i in (2, 3))
    moved = f"{NAME}.weight_scale"
    second[moved] = first.pop(moved)
    for i, tensors in ((2, first), (3, second)):
        save_file(tensors, run / f"model-0000{i}-of-00004.safetensors")

    def reindex(index):
        index["metadata"].pop("sha256")
        index["weight_map"][moved] = "model-00003-of-00004.safetensors"

    edit_json(run / "model.safetensors.index.json", reindex)
    found = load(run, dequantize=True)[0].state_dict()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_inspect(packed, capsys):
    run = packed([{"match": "*.v_proj", "quantizer": quantizer(8)}, {"match": "all", "quantizer": quantizer(3)}])
    capsys.readouterr()
    main(["inspect", str(run)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "compressed_tensors" in shown and "not packed: lm_head" in shown
    assert "model.layers.0.self_attn.v_proj have different schemes" in shown
    assert "loads in: lfq_lightning, transformers" in shown and "vLLM (" not in shown


def test_layers_that_vllm_fuses():
    four, three = QuantScheme(4), QuantScheme(3)
    assert fused_differently({"a.q_proj": four, "a.k_proj": four, "a.v_proj": four, "a.o_proj": three}, []) == []
    assert fused_differently({"a.gate_proj": four, "a.up_proj": three}, []) == ["a.gate_proj", "a.up_proj"]
    assert fused_differently({"a.gate_proj": four}, ["a.up_proj"]) == ["a.gate_proj", "a.up_proj"]


def test_generate_chat_and_bench(packed, capsys, monkeypatch):
    run = packed([{"match": "all", "quantizer": quantizer(4)}], chat=True)
    capsys.readouterr()
    main(["generate", str(run), "hello", "--max-new-tokens", "5"])
    first = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand now?\n\nnot read\n"))
    main(["chat", str(run), "--max-new-tokens", "5"])
    said = capsys.readouterr().out
    assert said.startswith(first.rstrip("\n")) and len(said) > len(first)
    main(["bench", str(run), "--prompt-tokens", "8", "--new-tokens", "3"])
    assert "ratio" in capsys.readouterr().out


def test_chat_needs_a_template(packed):
    run = packed([{"match": "all", "quantizer": quantizer(4)}])
    with pytest.raises(SystemExit):
        main(["chat", str(run)])


# ---- damage ------------------------------------------------------------------------------------------------------


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


SHARD = "model-00002-of-00004.safetensors"
NAME = "model.layers.0.mlp.up_proj"


def flip_a_bit(run):
    content = bytearray((run / SHARD).read_bytes())
    content[-5] ^= 4
    (run / SHARD).write_bytes(content)


def truncate(run):
    (run / SHARD).write_bytes((run / SHARD).read_bytes()[:-100])


def rewrite(change):
    def damage(run):
        tensors = load_file(run / SHARD)
        change(tensors)
        save_file(tensors, run / SHARD)
        edit_json(run / "model.safetensors.index.json", lambda index: index["metadata"].pop("sha256"))

    return damage


def group(key, value):
    return lambda run: edit_json(
        run / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update({key: value}),
    )


DAMAGE = {
    "a flipped bit": (flip_a_bit, "is not what was written"),
    "truncated": (truncate, "is not what was written"),
    "no shard": (lambda run: (run / SHARD).unlink(), "cannot be read"),
    "no config": (lambda run: (run / "config.json").unlink(), "no config.json"),
    "half a config": (lambda run: (run / "config.json").write_text('{"a'), "config or index is damaged"),
    "no index": (lambda run: (run / "model.safetensors.index.json").unlink(), "neither model.safetensors.index.json"),
    "a path in the index": (
        lambda run: edit_json(
            run / "model.safetensors.index.json", lambda i: i["weight_map"].update({f"{NAME}.weight_scale": "../x"})
        ),
        "is no file name",
    ),
    "no scale": (rewrite(lambda t: t.pop(f"{NAME}.weight_scale")), "has no tensor .*up_proj.weight_scale"),
    "another shape": (
        rewrite(lambda t: t.update({f"{NAME}.weight_scale": torch.zeros(3, 3)})),
        r"weight_scale is \(3, 3\), but by config.json it would be \(96, 2\)",
    ),
    "act-order": (
        rewrite(lambda t: t.update({f"{NAME}.weight_g_idx": torch.zeros(64)})),
        "holds .*weight_g_idx, which",
    ),
    "other bits": (group("num_bits", 4), "config and shards do not belong together"),
    "other groups": (group("group_size", 48), "groups of 48 do not divide the 64 inputs"),
    "floats": (group("type", "float"), "only integers in plain groups are read here"),
    "no groups": (
        lambda run: edit_json(run / "config.json", lambda c: c["quantization_config"].pop("config_groups")),
        "quantization_config lacks",
    ),
    "another method": (
        lambda run: edit_json(run / "config.json", lambda c: c["quantization_config"].update(quant_method="exl2")),
        "is quantised by exl2, which is not read here; known: awq",
    ),
    "not packed": (
        lambda run: edit_json(run / "config.json", lambda c: c.pop("quantization_config")),
        "is not packed",
    ),
    "another model": (
        lambda run: edit_json(run / "config.json", lambda c: c.update(num_hidden_layers=2, layer_types=None)),
        "its config knows nothing of",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from tests.test_scheduler import Rule, calibrate

    folder = tmp_path_factory.mktemp("damage")
    model = save_tiny(folder / "model", dtype=torch.float16, **WIDE)
    text = folder / "text.txt"
    text.write_text("<|endoftext|>".join(f"{i} green bottles hanging on wall {i}; " * 3 for i in range(40)))
    calibrate(model, text, folder / "run", rules=[Rule("all", quantizer(3))])
    return folder / "run"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(damage, whole, tmp_path, capsys):
    for file in whole.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    change, message = DAMAGE[damage]
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)
    with pytest.raises(SystemExit) as exit_code:
        main(["inspect", str(tmp_path)])
    assert exit_code.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("lfq: error: ") and len(shown.splitlines()) == 1
