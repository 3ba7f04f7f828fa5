"""The scale search against a brute-force loop in fp64."""

import math

import pytest
import torch

from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.grids.search_scale import search_scale
from lfq_lightning.quantizers.awq import AWQ


def error_of(group, scale, zero, scheme, hessian):
    codes = ((group / scale).round() + zero).clamp(0, scheme.max_code)
    error = (codes - zero) * scale - group
    return float(error @ hessian @ error)


@pytest.mark.parametrize("both_zeros", [False, True])
@pytest.mark.parametrize("measure", ["plain", "diagonal", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [IntegerGrid(3, 10), IntegerGrid(2, 10, False), IntegerGrid(4, -1)], ids=str)
def test_no_candidate_is_better(scheme, dtype, measure, both_zeros):
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    width = scheme.group_of(50)
    inputs = torch.randn(50 // width, 99, width, generator=torch.Generator().manual_seed(1))
    inputs *= torch.logspace(-1, 1, width)
    blocks = inputs.transpose(1, 2) @ inputs
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    hessian, by_group = {
        "plain": (None, torch.eye(width).expand_as(blocks)),
        "diagonal": (diagonal.flatten(), diagonal.diag_embed()),
        "blocks": (blocks, blocks),
    }[measure]
    scale, zero = search_scale(weight, scheme, dtype, ratios=20, hessian=hessian, both_zeros=both_zeros)
    assert scale.dtype == dtype
    groups = weight.double().view(6, -1, width)
    for o in range(6):
        for g in range(groups.shape[1]):
            group, by = groups[o, g], by_group[g].double()
            found = error_of(group, scale[o, g].double(), zero[o, g].double(), scheme, by)
            low, high = min(group.min().item(), 0), max(group.max().item(), 0)
            for ratio in torch.linspace(1, 0.5, 20).tolist():
                if scheme.symmetric:
                    size = max(-low, high) * ratio / (scheme.middle_code - 0.5)
                    candidates = [(size, scheme.middle_code), (-size, scheme.middle_code)]
                else:
                    step = (high - low) * ratio / scheme.max_code
                    exact = -low * ratio / step
                    zeros = [math.floor(exact), math.ceil(exact)] if both_zeros else [round(exact)]
                    candidates = [(step, min(max(zero_point, 0), scheme.max_code)) for zero_point in zeros]
                for size, z in candidates:
                    size = torch.tensor(size).to(dtype).double()
                    assert found <= error_of(group, size, z, scheme, by) * (1 + 1e-5)


def test_awq_at_two_bits_tries_both_zeros():
    """With inputs that weigh alike its grid is the search's: half the ranges and both zeros, but not if symmetric."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    for scheme, ratios, both in ((IntegerGrid(2, 16, False), 10, True), (IntegerGrid(2, 16), 20, False)):
        awq = AWQ(weight, scheme, torch.float32)
        awq.observe(torch.eye(32))
        awq.solve()
        found = search_scale(weight, scheme, torch.float32, ratios, both_zeros=both)
        shipped = awq.export()
        assert torch.equal(shipped.scale, found[0]) and torch.equal(shipped.zero_point, found[1])


def test_the_range_is_used():
    """A grid that holds the weights exactly is found."""
    weight = torch.tensor([[-4.0, -2, 0, 1, 3, 2, -1, -3]])
    scale, zero = search_scale(weight / 4 * 3.5, IntegerGrid(3), torch.float32, ratios=41)
    codes = (weight / 4 * 3.5 / scale[0] + zero[0]).clamp(0, 7).round()
    assert torch.allclose((codes - zero[0]) * scale[0], weight / 4 * 3.5, atol=1e-2)
