"""AdaRound's soft rounding against autograd of its formula in fp64, and that it hardens."""

import pytest
import torch

from lfq_lightning.errors import UserError
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.plan import Plan, Rule
from lfq_lightning.quantizers.adaround import AdaRound
from lfq_lightning.quantizers.rtn import RTN


def quantizer(scheme, rows=5, columns=18):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    start = RTN(weight, scheme, torch.float32)
    start.solve()
    return AdaRound(weight, start.export()), weight, start.export()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.6])
def test_soft_value_and_gradient(symmetric, progress):
    scheme = IntegerGrid(2, 9, symmetric)
    learned, weight, start = quantizer(scheme)
    learned.anneal(progress)
    upstream = torch.randn(5, 18)
    (learned() * upstream).sum().backward()

    position = learned.position.detach().double().requires_grad_()
    log_scale = learned.log_scale.detach().double().requires_grad_()
    scale = start.scale.double() * log_scale.exp()
    zero = start.zero_point.double()
    low = (weight.view(5, 2, 9) / start.scale).floor().double()
    codes = (low + zero + (position * 1000.0**progress).sigmoid()).clamp(0, 3)
    expected = ((codes - zero) * scale).flatten(1)
    (expected * upstream).sum().backward()
    assert torch.allclose(learned().double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(learned.position.grad.double(), position.grad, rtol=1e-3, atol=1e-5)
    assert torch.allclose(learned.log_scale.grad.double(), log_scale.grad, rtol=1e-3, atol=1e-4)


def test_it_starts_between_the_levels_and_ends_on_them():
    learned, weight, start = quantizer(IntegerGrid(8, 9, symmetric=False))
    inside = (start.codes > 0) & (start.codes < 255)
    level = start.scale.max()
    assert (learned() - weight)[inside].abs().max() < 0.03 * level  # before hardening it is the weight itself
    learned.anneal(1.0)
    assert torch.allclose(learned(), start.dequantize(), atol=1e-3 * float(level))
    learned.eval()
    assert torch.equal(learned(), start.dequantize())


def test_sharpness_is_checked():
    with pytest.raises(UserError, match="sharpness"):
        Plan([Rule("all", {"name": "adaround", "sharpness": 1.0})])
