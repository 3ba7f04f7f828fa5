"""AWQ's folding: exact for the model's function in every family, and better than rounding to nearest alone."""

import pytest
import torch

from lfq_lightning.calibration.fold_scales import _divide, fold_scales
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import Plan, Rule
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantizers.awq import AWQ
from lfq_lightning.quantizers.rtn import RTN
from tests.helpers import save_tiny


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
        scale = _divide(norm, torch.tensor([8.0, 8.0, 8.0]), torch.bfloat16, unit_offset=True)
    assert torch.equal(norm.weight.detach(), torch.tensor([-0.9921875, -0.875, -1.0]))
    assert torch.equal(scale, torch.tensor([1.0, 8.0, 1.0]))


def test_the_function_stays(family_folder):
    check_the_function(family_folder, set())


def check_the_function(folder, also):
    skeleton = ModelSkeleton(open_checkpoint(str(folder)))
    skeleton.embed(torch.zeros(1, 16, dtype=torch.int64))
    plan = Plan([Rule("all", {"name": "awq", "bits": 3, "group_size": 16})]).resolve(skeleton)[1]
    block, untouched = skeleton.block(plan.indices), skeleton.block(plan.indices)
    ((hidden, _),) = batches()(0)
    with torch.no_grad():
        observed = fold_scales(
            block, plan.layers, batches(), skeleton.checkpoint.family, torch.float32, Ranks(torch.device("cpu"))
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
    scheme = QuantScheme(3, 16)
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
