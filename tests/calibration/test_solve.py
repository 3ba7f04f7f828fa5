"""Solving a block: stages, true-sequential inputs, pads."""

import pytest
import torch

from lfq_lightning.calibration.solve import solve
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import Plan, Rule
from lfq_lightning.quantizers.gptq import GPTQ

ONE = Ranks(torch.device("cpu"))


@pytest.fixture
def skeleton(llama):
    skeleton = ModelSkeleton(open_checkpoint(str(llama)))
    skeleton.embed(torch.zeros(1, 16, dtype=torch.int64))
    return skeleton


def batches(seed=0):
    hidden = torch.randn(6, 16, 32, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(6, 16, dtype=torch.bool)
    mask[1, 5:] = False
    mask[4, 1:] = False
    return lambda half: iter([(hidden[:4], mask[:4]) if half == 0 else (hidden[4:], mask[4:])])


def test_true_sequential_by_hand(skeleton):
    """Layer by layer: hook the real inputs after quantising everything before, drop pads, solve alone."""
    plan = Plan([Rule("all", {"name": "gptq", "bits": 3, "group_size": 16})]).resolve(skeleton)[1]
    block, inputs = skeleton.block(range(1, 2)), batches()
    with torch.no_grad():
        solutions = solve(block, plan.layers, inputs, torch.float32, inputs, ONE, {})
        assert list(solutions) == [
            *(f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"),
            *(f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")),
        ]
        for stage in (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]):
            reference = skeleton.block(range(1, 2))
            earlier = list(solutions)[: [n.rpartition(".")[2] for n in solutions].index(stage[0])]
            for name in earlier:
                reference.linears()[name].weight.copy_(solutions[name].quantized.dequantize())
            for name in solutions:
                if name.rpartition(".")[2] not in stage:
                    continue
                linear = reference.linears()[name]
                quantizer = GPTQ(linear.weight.detach().clone(), plan.layers[name].scheme, torch.float32)
                seen = []
                hook = linear.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
                for hidden, mask in (*inputs(0), *inputs(1)):
                    reference(hidden)
                    quantizer.observe(seen.pop()[mask])
                hook.remove()
                quantizer.solve()
                assert torch.equal(quantizer.export().codes, solutions[name].quantized.codes), name
                assert torch.equal(block.linears()[name].weight, solutions[name].quantized.dequantize())


def test_layers_without_a_rule_stay(skeleton):
    plan = Plan([Rule("*.down_proj", {"name": "gptq", "group_size": 16})]).resolve(skeleton)[0]
    block = skeleton.block(range(1))
    with torch.no_grad():
        solutions = solve(block, plan.layers, batches(), torch.float32, batches(), ONE, {})
    assert list(solutions) == ["model.layers.0.mlp.down_proj"]
    for name, linear in skeleton.block(range(1)).linears().items():
        assert torch.equal(linear.weight, block.linears()[name].weight) == (name != "model.layers.0.mlp.down_proj")


def test_the_reference_is_the_full_precision_layers_input(skeleton, monkeypatch):
    """By hand: hook the inputs of an untouched block on the teacher's stream, layer by layer."""
    plan = Plan([Rule("all", {"name": "gptq", "bits": 2, "group_size": 16, "correct": 1.0})]).resolve(skeleton)[1]
    student, teacher = batches(), batches(seed=1)
    seen = []
    monkeypatch.setattr(GPTQ, "observe_reference", lambda _, inputs, reference: seen.append((inputs, reference)))
    with torch.no_grad():
        solve(skeleton.block(range(1, 2)), plan.layers, student, torch.float32, teacher, ONE, {})
        untouched = skeleton.block(range(1, 2))
        expected = []
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            linear, caught = untouched.linears()[f"model.layers.1.{name}"], []
            hook = linear.register_forward_pre_hook(lambda _, arguments, caught=caught: caught.append(arguments[0]))
            for hidden, mask in (*teacher(0), *teacher(1)):
                untouched(hidden)
                expected.append(caught.pop()[mask])
            hook.remove()
    assert len(seen) == len(expected) == 8
    for (inputs, reference), wanted in zip(seen, expected, strict=True):
        assert torch.equal(reference, wanted)
        assert inputs.shape == reference.shape and not torch.equal(inputs, reference)
