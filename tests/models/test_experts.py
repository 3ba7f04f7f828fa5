"""Mixtures of experts: every expert is quantised, by its own tokens and without pads; those with few are reported."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lfq_lightning.calibration.solve import solve
from lfq_lightning.cli import main
from lfq_lightning.data import CalibrationData
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.formats.compressed_tensors import CompressedTensors
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.experts import ExpertList
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.packed.engines import engines
from lfq_lightning.packed.load_model import load
from lfq_lightning.packed.packed_folder import PackedFolder
from lfq_lightning.plan import Plan, Rule
from lfq_lightning.planning.block_work import block_work
from lfq_lightning.planning.memory_estimate import Setting
from lfq_lightning.planning.plan_run import parse_machine, plan_run
from tests.helpers import FLEXROUND, GPTQ, fails, run, save_tiny

MIXTURES = ("mixtral", "qwen3_moe")
ONE = Ranks(torch.device("cpu"))


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


def expert_layers(folder):
    return [name for name in PackedFolder(folder).schemes if ".experts." in name]


@pytest.mark.parametrize("quantizer", [GPTQ, {"name": "awq", "bits": 3, "group_size": 16}, {"name": "rtn", "bits": 4}])
def test_all_experts_ship_packed(mixture, config, quantizer):
    path = config(model={"checkpoint": str(mixture)}, plan=[{"match": "all", "quantizer": quantizer}])
    run(path)
    folder = path.parent / "run"
    assert len(expert_layers(folder)) == 3 * 4 * 3  # blocks, experts, matrices
    stored = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    original = {name for file in mixture.glob("*.safetensors") for name in load_file(file)}
    unpacked = {name.replace(".weight_packed", ".weight") for name in stored}
    unpacked = {name for name in unpacked if not name.endswith(("_scale", "_shape", "_zero_point"))}
    assert unpacked == original, "names on disk are the checkpoint's"
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert sum(name.endswith(".gate") for name in settings["ignore"]) == 3, "no engine may take a router for packed"


def test_lfq_trains_experts_and_resumes_and_exports(mixture, config, tmp_path):
    plan = [
        {"match": "last", "quantizer": {**FLEXROUND, "bits": 4}, "objective": "logit_ce", "steps": 8, "batch_size": 4},
        {"match": "all", "quantizer": {**GPTQ, "bits": 4}},
    ]
    run(config(model={"checkpoint": str(mixture)}, plan=plan))
    folder = tmp_path / "run"
    last = json.loads((folder / "journal.jsonl").read_text().splitlines()[-1])
    assert last["loss_after"] <= last["loss_before"]
    run(tmp_path / "config.yaml", "--output", str(tmp_path / "again"), "--reuse", str(folder))
    for file in folder.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    main(["export", str(folder), "--format", "compressed-tensors", "--output", str(tmp_path / "copy")])
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [load(f, dequantize=True)[0](ids).logits for f in (folder, tmp_path / "copy")]
        theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        packed = load(folder)[0](ids).logits
    assert torch.equal(*logits)
    assert torch.allclose(logits[0], theirs, atol=1e-5) and torch.allclose(logits[0], packed, atol=0.05)


def test_an_experts_codes_are_gptq_of_its_own_tokens(mixture):
    """Against GPTQ by itself on the tokens that the router sends to the expert, pads left out."""
    skeleton = ModelSkeleton(open_checkpoint(str(mixture)))
    skeleton.embed(torch.zeros(1, 20, dtype=torch.int64))  # blocks are called as they are for 20 tokens
    block = skeleton.block(range(0, 1))
    rule = Rule("all", {"name": "gptq", "bits": 3, "group_size": 16, "symmetric": False})
    plan = Plan([rule]).resolve(skeleton)[0]
    torch.manual_seed(0)
    hidden, mask = torch.randn(6, 20, 32), torch.ones(6, 20, dtype=torch.bool)
    mask[1, 7:] = False
    hidden[~mask] *= 50.0  # would be seen at once
    experts = next(name for name, m in block.modules_by_name().items() if isinstance(m, ExpertList))
    layer = next(name for name in plan.layers if name.startswith(f"{experts}.2."))
    weight, caught = block.linears()[layer].weight.clone(), []

    def inputs(half):
        yield hidden[half::2], mask[half::2]

    attention = {name: layer_plan for name, layer_plan in plan.layers.items() if ".experts." not in name}
    with torch.no_grad():
        solve(block, attention, inputs, torch.float32, inputs, ONE, {})
        hook = block.modules_by_name()[experts].register_forward_pre_hook(lambda _, given: caught.append(given))
        for half in (0, 1):
            block(hidden[half::2])
        hook.remove()
        rows = []
        for (states, indices, _), half in zip(caught, (0, 1), strict=True):
            rows.append(states[(indices == 2).any(1) & mask[half::2].flatten()])
        assert 0 < sum(map(len, rows)) < mask.sum()
        chosen = {name: layer_plan for name, layer_plan in plan.layers.items() if ".experts." in name}
        found = solve(block, chosen, inputs, torch.float32, inputs, ONE, {})[layer].quantized
        alone = plan.layers[layer].closed_form.build(weight, plan.layers[layer].scheme, torch.float32)
        for shown in rows:
            alone.observe(shown)
        alone.solve()
    assert (found.codes == alone.export().codes).float().mean() > 0.999


def test_experts_without_tokens_are_rounded_and_reported(tmp_path, config, caplog):
    model = save_tiny(tmp_path / "model", "qwen3_moe", num_experts=16, num_experts_per_tok=1)
    with caplog.at_level(logging.WARNING):
        run(config(model={"checkpoint": str(model)}, plan=[{"match": "all", "quantizer": GPTQ}]))
    assert "and 15 more experts: 0 …" in caplog.text and "none: rounded to nearest" in caplog.text
    tokens, _ = load(tmp_path / "run", dequantize=True)
    original = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, weight in tokens.named_parameters():
        if name.endswith("down_proj.weight"):
            before, _, after = name.partition(".experts.")
            fused = original[f"{before}.experts.down_proj"][int(after.split(".")[0])]
            assert (weight - fused).norm() < 0.5 * fused.norm(), "an expert was lost"


def test_work_counts_the_tokens_an_expert_sees(mixture):
    skeleton = ModelSkeleton(open_checkpoint(str(mixture)))
    plan = Plan([Rule("all", "rtn")]).resolve(skeleton)[0]
    shapes = skeleton.linear_shapes(0)
    per_token = sum(2 * o * i * (0.5 if ".experts." in name else 1) for name, (o, i) in shapes.items())
    work = block_work(
        plan, skeleton, Setting(1, False, samples=10, held_out=1, seq_len=10, compute_bytes=4, stream_bytes=4)
    )
    config = skeleton.checkpoint.text_config
    readout = 4 * config.hidden_size * config.vocab_size * 10
    assert work.flop == pytest.approx(2 * per_token * 110 + 2 * per_token * 10 + readout)


def test_correction_of_experts_is_refused(tmp_path, config, capsys):
    model = save_tiny(tmp_path / "model", "qwen3_moe")
    path = config(model={"checkpoint": str(model)}, plan=[{"match": "all", "quantizer": {**GPTQ, "correct": 0.5}}])
    assert "omit `correct` for experts" in fails(capsys, "run", "--config", str(path))


def test_vllm_wants_one_scheme_for_all_experts(mixture):
    def schemes(bits_of_one):
        layers = [
            f"model.layers.0.mlp.experts.{e}.{m}" for e in range(3) for m in ("gate_proj", "up_proj", "down_proj")
        ]
        return {name: IntegerGrid(bits_of_one if ".2.down" in name else 4, 16, True) for name in layers}

    assert any(engine.startswith("vLLM") for engine in engines(CompressedTensors(), schemes(4), []))
    assert not any(engine.startswith("vLLM") for engine in engines(CompressedTensors(), schemes(8), []))


def test_equal_blocks_of_a_mixture_are_one_row_of_a_plan(tmp_path):
    model = save_tiny(tmp_path / "model", "qwen3_moe", num_hidden_layers=5)
    machine = parse_machine("1GB", 1, None, "32-true")
    data = CalibrationData("none.txt", num_samples=2, seq_len=8, num_held_out=1)
    assert len(plan_run(str(model), [Rule("all", "rtn")], data, "32-true", machine).blocks) == 1
