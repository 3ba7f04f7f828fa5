"""Every quantizer through a whole run: its files load in transformers with the weights we load."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from lfq_lightning.cli import main
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.packed.load_model import load
from lfq_lightning.quantizers import QUANTIZERS, DenseQuantizer
from tests.helpers import GPTQ

SCHEME = {"bits": 4, "group_size": 16}


def run(config, **changes):
    path = config(**changes)
    main(["run", "--config", str(path)])
    return path.parent / "run"


def same_in_transformers(output):
    ours, _ = load(output, dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(output)
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)


@pytest.mark.parametrize("name", QUANTIZERS.names())
def test_each_quantizer_everywhere_and_lfq_on_the_last_block(name, config):
    dense = issubclass(QUANTIZERS.get(name), DenseQuantizer)
    quantizer = {"name": name} if dense else {"name": name, **SCHEME}
    plan = [
        {"match": "last", "quantizer": quantizer, "objective": "logit_ce", "steps": 8, "batch_size": 4},
        {"match": "all", "quantizer": quantizer, "steps": 8, "batch_size": 4},
    ]
    output = run(config, plan=plan)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["held_out"]["kl"] <= metrics["before_last_training"]["held_out"]["kl"] * 1.0001
    if name == "fp":
        assert metrics["held_out"]["kl"] == pytest.approx(0, abs=1e-6)
    if dense:
        assert "quantization_config" not in json.loads((output / "config.json").read_text())
    if not dense:
        same_in_transformers(output)


@pytest.mark.parametrize("init", ["rtn", "gptq", "awq"])
def test_flexround_from_each_start(init, config):
    quantizer = {"name": "flexround", **SCHEME, "init": init, "offset": True, "zero_point": True, "symmetric": False}
    plan = [{"match": "all", "quantizer": quantizer, "steps": 8, "batch_size": 4}]
    output = run(config, plan=plan)
    journal = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    assert all(line["loss_after"] <= line["loss_before"] for line in journal)


@pytest.mark.parametrize("final_blocks", [2, 3])
def test_the_last_blocks_together(final_blocks, config):
    last = {"name": "flexround", "bits": 3, "group_size": 16, "init": "gptq"}
    plan = [
        {
            "match": "last",
            "final_blocks": final_blocks,
            "quantizer": last,
            "objective": "logit_ce",
            "steps": 8,
            "batch_size": 4,
        }
    ]
    plan += [{"match": "all", "quantizer": GPTQ}] * (final_blocks < 3)
    output = run(config, plan=plan)
    journal = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    assert len(journal) == 4 - final_blocks
    assert journal[-1]["index"] == 3 - final_blocks
    assert journal[-1]["name"] == " + ".join(f"model.layers.{i}" for i in range(3 - final_blocks, 3))
    assert journal[-1]["loss_after"] < journal[-1]["loss_before"]
    assert journal[-1]["kl_after"] < journal[-1]["kl_before"]
    same_in_transformers(output)


BAD_PLUGIN = '''
import torch
from lfq_lightning.{kind}s import {kind_upper}S, {base}

@{kind_upper}S.register
class Bad({base}):
    """Returns nonsense."""
    paper = "none"
'''
BAD_LEARNED = """
    def grid(self):
        return {grid}

    def levels(self, scale):
        return self.latent / scale

    def forward(self):
        return {what}
"""
BAD_CLOSED = """
    needs_inputs = scales_inputs = {scales}

    def observe(self, inputs):
        pass

    def input_scale(self):
        {what}
        return torch.ones(self.weight.shape[1])

    def solve(self):
        groups = self.weight.shape[1] // self.scheme.group_of(self.weight.shape[1])
        self.scale = torch.ones(len(self.weight), groups, 1)
        self.zero_point = torch.zeros(len(self.weight), groups, 1, dtype=torch.uint8)
        {what}

    def export(self):
        codes = torch.zeros_like(self.weight)
        {what}
        return self.quantized(codes, self.scale, self.zero_point)
"""
BAD_DENSE = """
    def export(self):
        return {what}
"""
BAD_OBJECTIVE = """
    def target(self, hidden, head):
        return {target}

    def token_loss(self, hidden, target, head):
        return {what}
"""
BAD_DIVERGENCE = """
    def divergence(self, student, teacher):
        return {what}
"""
BAD = {  # what returns nonsense: its base class and its body
    "quantizer": ("LearnedQuantizer", BAD_LEARNED),
    "grid": ("LearnedQuantizer", BAD_LEARNED),
    "closed": ("NearestQuantizer", BAD_CLOSED),
    "dense": ("DenseQuantizer", BAD_DENSE),
    "objective": ("Objective", BAD_OBJECTIVE),
    "sum": ("Objective", BAD_OBJECTIVE),
    "target": ("Objective", BAD_OBJECTIVE),
    "divergence": ("DivergenceObjective", BAD_DIVERGENCE),
}
GOOD = {"grid": "self.start_scale, self.start_zero", "target": "{}"}
GOOD_WHAT = {"grid": "super().forward()", "target": "hidden.mean(-1)"}  # beside a bad grid, a bad target


@pytest.mark.parametrize(
    ("kind", "what", "message"),
    [
        (
            "quantizer",
            "super().forward()[:, :3]",
            r"forward returned \(32, 3\) for model.layers.0.self_attn.q_proj; return",
        ),
        (
            "grid",
            "self.start_scale[:3], self.start_zero",
            r"grid returned \(3, 2, 1\) and \(32, 2, 1\) for model.layers.0",
        ),
        ("quantizer", "super().forward() * float('nan')", "forward returned NaN or infinity for model.layers.0"),
        ("objective", "(hidden - target['hidden']).square().mean()", r"token_loss returned \(\) for .* tokens"),
        (
            "objective",
            "(hidden - target['hidden']).mean(-1) * float('nan')",
            "block 0: the held-out loss is nan at step 0",
        ),
        ("objective", "target['hidden'].mean(-1)", "its loss has no gradient"),
        ("sum", "(hidden - target['hidden']).square().mean()", r"bad_sum_\d+: token_loss returned \(\) for .* tokens"),
        ("divergence", "(student - teacher).square().mean()", r"divergence returned \(\) for .* tokens"),
        ("target", "[hidden]", "target must return a dict of tensors"),
        ("target", "{'some': hidden[:3]}", "each with a row for each of the"),
        ("dense", "self.weight[:, :3]", r"export returned \(32, 3\) for model.layers.0.self_attn.q_proj"),
        ("dense", "self.weight * float('nan')", "or NaN or infinity; return a finite weight"),
        (
            "closed",
            "if 'codes' in locals(): codes[0, 0] = 77",
            "some codes are NaN or lie outside 0 … 15, for model",
        ),
        ("closed", "self.scale = torch.ones(3, 1, 1)", r"scale and zero point are \(3, 1, 1\) and .*, but must be"),
        ("closed", "if 's': return -torch.ones(32)", "input_scale returned .* values that are not positive"),
    ],
)
def test_plugins_that_return_nonsense(kind, what, message, config, capsys, tmp_path, monkeypatch):
    for registry in (QUANTIZERS, OBJECTIVES):  # it is forgotten again
        registry.names()
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    name = f"bad_{kind}_{abs(hash(what))}"
    file = tmp_path / f"{name}.py"
    base, body = BAD[kind]
    trains = base.endswith("Objective")
    plugin = "objective" if trains else "quantizer"
    parts = {"what": what, "scales": what.startswith("if 's'"), **GOOD}
    parts |= {"what": GOOD_WHAT[kind], kind: what} if kind in GOOD else {}
    file.write_text(BAD_PLUGIN.format(kind=plugin, kind_upper=plugin.upper(), base=base) + body.format(**parts))
    match = "last" if kind == "divergence" else "all"
    plan = [{"match": match, "quantizer": "flexround" if trains else {"name": name, "group_size": 16}, "steps": 4}]
    if trains:
        plan[0]["objective"] = [{"name": name, "weight": 1}, {"name": "mse", "weight": 1}] if kind == "sum" else name
    path = config(plan=plan, plugins=[str(file)])
    with pytest.raises(SystemExit) as stop:
        main(["run", "--config", str(path)])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_sum_of_objectives(config):
    quantizer = {"name": "flexround", "bits": 3, "group_size": 16}
    both = [{"name": "mse", "weight": 0.5}, {"name": "kl", "weight": 1}]
    plan = [{"match": "last", "quantizer": quantizer, "objective": both, "steps": 8, "batch_size": 4}]
    output = run(config, plan=plan)
    last = json.loads((output / "journal.jsonl").read_text().splitlines()[-1])
    assert last["objective"] == "mse+kl"
    assert last["loss_after"] < last["loss_before"]
