"""A size instead of a plan: what fits, what is measured, and what the run takes."""

import itertools
import json

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lfq_lightning.cli import main
from lfq_lightning.errors import UserError
from lfq_lightning.grids import IntegerGrid
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.experts import in_expert
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.planning.choose_grids import choose_grids, largest_grids, parse_size
from lfq_lightning.planning.spend import spend
from lfq_lightning.planning.swapped_model import SwappedModel
from lfq_lightning.quantizers import QUANTIZERS
from lfq_lightning.quantizers.gptq import GPTQ
from lfq_lightning.stages import Rule
from lfq_lightning.token_set import TokenSet
from tests.helpers import save_tiny

RTN = {"name": "rtn", "group_size": 16}
TOKENS = tuple(TokenSet.from_lists([list(range(n, n + 20))], 20) for n in (10, 90))

SEEN = TokenSet.from_lists([list(range(n, n + 20)) for n in (30, 50, 170)], 20)


def test_sizes():
    assert [parse_size(text) for text in ("60MB", "1.5 GB", "900kb")] == [60_000_000, 1_500_000_000, 900_000]
    for text in ("60", "MB", "-1MB", "infMB", "60 apples"):
        with pytest.raises(UserError, match="size: "):
            parse_size(text)


def test_spending_is_near_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        costs = [[10, 15, 20] if thing % 2 else [20, 40] for thing in range(6)]
        losses = [torch.rand(len(c), generator=generator).sort(descending=True).values.tolist() for c in costs]
        for budget in (90, 110, 140, 180):
            chosen = spend(costs, losses, budget)
            every = itertools.product(*(range(len(c)) for c in costs))
            fits = [n for n in every if sum(c[i] for c, i in zip(costs, n, strict=True)) <= budget]
            best = min(sum(loss[i] for loss, i in zip(losses, n, strict=True)) for n in fits)
            assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= budget
            assert sum(loss[i] for loss, i in zip(losses, chosen, strict=True)) <= 1.25 * best
    assert spend([[5], [6]], [[1.0], [1.0]], 10) is None


def average(rules, checkpoint):
    """Return bits per weight by the chosen rules, scales included, of a tiny Llama in fp32."""
    shapes = {n.removesuffix(".weight"): s for n, s in checkpoint.shapes().items() if ".layers." in n and len(s) == 2}
    bits = {name: rule.quantizer["bits"] + 32 / 16 for rule in rules for name in rule.match}
    assert bits.keys() == shapes.keys()
    return sum(bits[n] * o * i for n, (o, i) in shapes.items()) / sum(o * i for o, i in shapes.values())


@pytest.mark.parametrize("wanted", [4.0, 4.7, 6.2, 9.9])
def test_what_is_chosen_fits_and_engines_can_fuse_it(wanted, llama):
    checkpoint = open_checkpoint(str(llama))
    rules = choose_grids([Rule("all", {**RTN, "bits": [2, 3, 4, 8]})], checkpoint, SEEN, TOKENS, None, wanted)
    assert wanted - 1 < average(rules, checkpoint) <= wanted + 1e-6
    of = {name: rule.quantizer["bits"] for rule in rules for name in rule.match}
    for layer in range(3):
        assert len({of[f"model.layers.{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert len({of[f"model.layers.{layer}.mlp.{part}_proj"] for part in ("gate", "up")}) == 1


def test_widths_of_a_format(llama):
    """Without a list the grids of the rule's own format are there to choose from; in MLX's, the bits."""
    checkpoint = open_checkpoint(str(llama))
    for grid, allowed in (
        ("q8_0", {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"}),
        ({"name": "affine", "group_size": 32}, {2, 3, 4, 5, 6, 8}),
    ):
        plan = [Rule("*.down_proj", "fp"), Rule("all", {"name": "rtn", "grid": grid})]
        rules = choose_grids(plan, checkpoint, SEEN, TOKENS, None, 6.0)
        chosen = [rule.quantizer["grid"] for rule in rules if rule.quantizer != "fp"]
        assert {grid["bits"] if isinstance(grid, dict) else grid for grid in chosen} <= allowed
        assert len(chosen) > 1


def test_groups_that_are_no_power_of_two(tmp_path):
    model = save_tiny(tmp_path / "model", hidden_size=96, intermediate_size=192, head_dim=24)
    rule = Rule("all", {**RTN, "group_size": 96, "bits": [8, 2, 4]})
    rules = choose_grids([rule], open_checkpoint(str(model)), SEEN, TOKENS, None, 4.5)
    assert {rule.quantizer["bits"] for rule in rules} <= {2, 4, 8} and len(rules) > 1


def test_a_fragile_layer_gets_more_bits(llama, tmp_path):
    model = save_tiny(tmp_path / "model")
    checkpoint = open_checkpoint(str(model))
    tensors = checkpoint.tensors(checkpoint.names())
    for name in tensors:  # all but one layer hardly matter
        if "o_proj" in name or "down_proj" in name:
            tensors[name] *= 1.0 if "layers.1.mlp" in name else 0.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rules = choose_grids([Rule("all", {**RTN, "bits": [2, 8]})], open_checkpoint(str(model)), SEEN, TOKENS, None, 6.0)
    of = {name: rule.quantizer["bits"] for rule in rules for name in rule.match}
    assert of["model.layers.1.mlp.down_proj"] == 8


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_what_gptq_sees(family, tmp_path):
    """Layers with inputs are corrected on what transformers' own forward gives them; experts are not."""
    model = save_tiny(tmp_path / "model", family)
    checkpoint = open_checkpoint(str(model))
    swapped = SwappedModel(checkpoint, TOKENS[0], SEEN)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    caught = {}
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: caught.update({name: x[0]}))
    theirs(SEEN.input_ids)
    grid = IntegerGrid(3, 8)
    by_gptq, nearest = (QUANTIZERS.parse(name) for name in ("gptq", "rtn"))
    checked = 0
    for name, weight in swapped.layers().items():
        if in_expert(name):
            assert torch.equal(swapped.quantised(name, grid, by_gptq), swapped.quantised(name, grid, nearest))
            continue
        rows = caught[name].detach().reshape(-1, weight.shape[1])
        gptq = GPTQ(weight, grid, torch.float32)
        gptq.observe(rows)
        gptq.solve()
        wanted = gptq.export().dequantize()
        assert float((swapped.quantised(name, grid, by_gptq) == wanted).float().mean()) > 0.98, name
        change = (wanted - weight) @ rows.T
        assert swapped.output_error(name, wanted) == pytest.approx(float(change.square().sum()), rel=1e-3)
        checked += 1
    assert checked > 8


def test_a_run_of_a_size(config, tmp_path, caplog):
    """The model is no larger, its YAML has the plan, and a second start chooses nothing again."""
    model = save_tiny(tmp_path / "model", intermediate_size=64, dtype=torch.float16)
    plan = [
        {"match": "embeddings", "quantizer": {"name": "rtn", "grid": ["q4_0", "q8_0"]}},
        {"match": "last", "quantizer": {"name": "flexround", "grid": ["q4_0", "q5_0"]}, "steps": 2, "batch_size": 2},
        {"match": "all", "quantizer": {"name": "rtn", "grid": ["q4_0", "q5_0", "q8_0"]}},
    ]
    caplog.set_level("INFO")
    common = {"model": {"checkpoint": str(model)}, "plan": plan, "size": "27KB"}
    main(["run", "--config", str(config(**common))])
    assert "bits per weight" in caplog.text and "run.plan.yaml" in caplog.text
    size = json.loads((tmp_path / "run" / "metrics.json").read_text())["model_bytes"]
    assert 22_000 < size <= 27_000
    kept = yaml.safe_load((tmp_path / "run" / "lfq.yaml").read_text())
    assert kept["size"] is None and kept["average_bits"] is None
    assert all(isinstance(rule["quantizer"]["grid"], str) for rule in kept["plan"])
    main(["run", "--config", str(config(**common, overwrite=True))])
    assert "which an earlier start has chosen" in caplog.text


@pytest.mark.parametrize(
    ("rule", "asked", "message"),
    [
        ({"bits": [2, 4]}, (None, 1.5), r"the smallest this plan can be is 4\.000 bits per weight"),
        ({"bits": [2, 4]}, (100, None), r"the smallest this plan can be is .* bytes"),
        ({"bits": [2, 4]}, (100, 3.0), "give one of them, not both"),
        ({"name": "fp"}, (None, 5.0), "no rule of the plan leaves a grid to choose"),
    ],
)
def test_refusals(rule, asked, message, llama):
    quantizer = "fp" if "name" in rule else {**RTN, **rule}
    with pytest.raises(UserError, match=message):
        choose_grids([Rule("all", quantizer)], open_checkpoint(str(llama)), SEEN, TOKENS, *asked)


def test_a_choice_without_a_size(config, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--config", str(config(plan=[{"match": "all", "quantizer": {**RTN, "bits": [2, 3]}}]))])
    assert "bits [2, 3] is a choice, which needs `size` or `average_bits`" in capsys.readouterr().err


def test_plan_of_a_size_is_that_of_the_largest_grids(config, llama, capsys):
    """`lfq plan` measures nothing of the model: the most that the run may take."""
    common = {"model": {"checkpoint": str(llama)}, "output": "nowhere"}
    of = {}
    for bits, more in (([2, 8, 4], {"average_bits": 5.0}), (8, {}), (2, {})):
        file = config(plan=[{"match": "all", "quantizer": {**RTN, "bits": bits}}], **common, **more)
        main(["plan", "--config", str(file), "--gpus", "80GB"])  # of which nothing is measured either
        of[str(bits)] = capsys.readouterr().out
    assert of["[2, 8, 4]"] == of["8"]
    rules = [Rule("all", {**RTN, "bits": [2, 8, 4]})]
    largest = largest_grids(rules, ModelSkeleton(open_checkpoint(str(llama))))
    assert {rule.quantizer["bits"] for rule in largest} == {8}
