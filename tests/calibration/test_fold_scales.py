"""AWQ's folding: exact for the model's function in every family, and better than rounding to nearest alone."""

import pytest
import torch

from lfq_lightning.calibration.find_folds import Fold, FoundFolds, divide, find_folds
from lfq_lightning.calibration.fold_scales import _listed, fold_scales
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import Plan, Rule
from lfq_lightning.quantizers.awq import AWQ
from lfq_lightning.quantizers.rtn import RTN
from tests.helpers import save_tiny

CPU = Ranks(torch.device("cpu"))


def batches():
    hidden = torch.randn(6, 16, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 32)
    mask = torch.ones(6, 16, dtype=torch.bool)
    mask[1, 5:] = False
    return lambda half: iter([(hidden[:4], mask[:4]) if half == 0 else (hidden[4:], mask[4:])])


def test_v_is_folded_with_its_bias(tmp_path):
    """With as many key heads as query heads; elsewhere that pair's shapes do not fit."""
    model = save_tiny(tmp_path, "qwen2", num_key_value_heads=4)
    inner = {"self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight", "mlp.down_proj.weight"}
    check_the_function(model, inner)


def test_a_channel_too_small_for_the_dtype_is_left_alone():
    """A Gemma norm multiplies by 1 + w; (1 + w) / 8 - 1 would round to -1 here, and the channel would be gone."""
    norm = torch.nn.LayerNorm(3, bias=False)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-0.9921875, 0.0, -1.0]))
        scale = divide(norm, torch.tensor([8.0, 8.0, 8.0]), torch.bfloat16, unit_offset=True)
    assert torch.equal(norm.weight.detach(), torch.tensor([-0.9921875, -0.875, -1.0]))
    assert torch.equal(scale, torch.tensor([1.0, 8.0, 1.0]))


def test_the_function_stays(family_folder):
    check_the_function(family_folder, set())


def test_folds_that_are_found_are_those_of_the_table(family_folder):
    skeleton = ModelSkeleton(open_checkpoint(str(family_folder)))
    skeleton.embed(torch.zeros(1, 16, dtype=torch.int64))
    block, untouched = skeleton.block(range(1, 2)), skeleton.block(range(1, 2))
    ((hidden, _),) = batches()(0)
    family = skeleton.checkpoint.family
    assert set(find_folds(block, hidden)) == set(_listed(block, family.folds, family.unit_offset))
    assert same_tensors(block, untouched)


@pytest.mark.parametrize("family", ["phi3", "opt", "gpt_neox", "glm4", "qwen3_next"])
def test_the_function_stays_where_folds_are_found(tmp_path, family):
    folder = save_tiny(tmp_path, family, tied=False)
    skeleton = ModelSkeleton(open_checkpoint(str(folder)))
    assert skeleton.checkpoint.family.folds is None
    skeleton.embed(torch.zeros(1, 16, dtype=torch.int64))
    plan = Plan([Rule("all", {"name": "awq", "bits": 3, "group_size": 16})]).resolve(skeleton)[1]
    block, untouched = skeleton.block(plan.indices), skeleton.block(plan.indices)
    ((hidden, _),) = batches()(0)
    with torch.no_grad():
        fold_scales(block, plan.layers, batches(), skeleton.checkpoint.family, torch.float32, CPU, FoundFolds())
        assert torch.allclose(block(hidden), untouched(hidden), rtol=1e-3, atol=1e-3)
    assert not same_tensors(block, untouched)


def test_a_norm_that_something_else_reads_too_is_not_folded():
    """A router beside the experts reads it; so does a gate that is no linear layer."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = torch.nn.LayerNorm(32), *(torch.nn.Linear(32, 32) for _ in range(2))

        def forward(self, hidden):
            normed = self.norm(hidden)
            return hidden + self.second(self.first(normed)) + (normed if self.also else 0)

    ((hidden, _),) = batches()(0)
    layer = Layer()
    block = DecoderBlock(["layers.0"], [layer], [{}])
    layer.also = False
    inner = Fold("layers.0.first", ("layers.0.second",))
    assert find_folds(block, hidden) == [Fold("layers.0.norm", ("layers.0.first",)), inner]
    layer.also = True
    assert find_folds(block, hidden) == [inner]


def same_tensors(block, other):
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in block.tensors().items())


def check_the_function(folder, also):
    skeleton = ModelSkeleton(open_checkpoint(str(folder)))
    skeleton.embed(torch.zeros(1, 16, dtype=torch.int64))
    plan = Plan([Rule("all", {"name": "awq", "bits": 3, "group_size": 16})]).resolve(skeleton)[1]
    block, untouched = skeleton.block(plan.indices), skeleton.block(plan.indices)
    ((hidden, _),) = batches()(0)
    with torch.no_grad():
        observed = fold_scales(
            block, plan.layers, batches(), skeleton.checkpoint.family, torch.float32, CPU, FoundFolds()
        )
        assert torch.allclose(block(hidden), untouched(hidden), rtol=1e-3, atol=1e-3)
        check_what_was_observed(block, observed)
    before, after = untouched.tensors(), block.tensors()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = [pair for pair in skeleton.checkpoint.family.folds if "norm" in pair[0]]
    expected = {f"{name}.weight" for source, readers in norms for name in (source, *readers)} | also
    assert {f"{block.names[0]}.{name}" for name in expected} <= changed


def check_what_was_observed(block, observed):
    """It must be what the layers read now, folded."""
    assert observed
    for name, (hessian, activation, tokens) in observed.items():
        caught = []
        hook = block.linears()[name].register_forward_pre_hook(lambda _, given, caught=caught: caught.append(given[0]))
        masks = []
        for hidden, mask in [*batches()(0), *batches()(1)]:
            block(hidden)
            masks.append(mask)
        hook.remove()
        rows = torch.cat([inputs[mask] for inputs, mask in zip(caught, masks, strict=True)]).double()
        assert tokens == len(rows)
        assert torch.allclose(
            hessian.double(), rows.T @ rows, rtol=1e-3, atol=1e-3 * float((rows.T @ rows).abs().max())
        )
        assert torch.allclose(activation.double(), rows.abs().sum(0), rtol=1e-3)


def test_scaling_helps_where_channels_differ():
    """By hand: round W·diag(s) for x / s and compare the output error with plain rounding, both min-max."""
    torch.manual_seed(0)
    weight = torch.randn(24, 32)
    inputs = torch.randn(400, 32) * torch.logspace(-1.5, 1.5, 32)[torch.randperm(32)]
    scheme = IntegerGrid(3, 16)
    quantizer = AWQ(weight, scheme, torch.float32)
    quantizer.observe(inputs)
    scale = quantizer.input_scale()

    def error(s):
        rtn = RTN(weight * s, scheme, torch.float32, ratios=1)
        rtn.solve()
        return float(((inputs @ (rtn.export().dequantize() / s - weight).T) ** 2).sum())

    assert error(scale) < 0.6 * error(torch.ones(32))
    everything = [error(torch.ones(32))]
    activation, size = inputs.abs().mean(0), weight.abs().view(24, 2, 16)
    relative = (size / size.amax(-1, keepdim=True)).mean(0).flatten() + 1e-4
    for number in range(20):
        s = activation ** (number / 20) / relative ** (1 - number / 20)
        everything.append(error(s / (s.max() * s.min()).sqrt()))
    assert error(scale) == pytest.approx(min(everything), rel=1e-4)
