"""The contract of every registered quantizer, over widths, groups and odd shapes."""

import pytest
import torch

from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantizers import QUANTIZERS, ClosedFormQuantizer, LearnedQuantizer

CLOSED = [name for name in QUANTIZERS.names() if issubclass(QUANTIZERS.get(name), ClosedFormQuantizer)]
LEARNED = [name for name in QUANTIZERS.names() if issubclass(QUANTIZERS.get(name), LearnedQuantizer)]
VARIANTS = [
    *LEARNED,
    {"name": "flexround", "offset": True, "zero_point": True},
    {"name": "flexround", "rank": 3},
    {"name": "flexround", "rank": 1000},
]
SCHEMES = [
    QuantScheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (-1, 9, 63) for symmetric in (True, False)
]


def problem(rows=7, columns=63):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return weight, torch.randn(500, columns, generator=generator) @ mixing


def solved(name, scheme, dtype=torch.float32, weight=None):
    known, inputs = problem()
    quantizer = QUANTIZERS.parse(name).build(known if weight is None else weight, scheme, dtype)
    if quantizer.needs_inputs:
        for part in inputs.split(200):
            quantizer.observe(part)
    quantizer.solve()
    return quantizer


def rounded(latent, quantized):
    """Round a latent weight to nearest on the grid of `quantized`, element by element in Python."""
    codes = torch.empty_like(quantized.codes)
    size = quantized.scheme.group_of(latent.shape[1])
    for o in range(latent.shape[0]):
        for i in range(latent.shape[1]):
            scale = quantized.scale[o, i // size, 0].float()
            code = round((latent[o, i] / scale).item()) + int(quantized.zero_point[o, i // size, 0])
            codes[o, i] = min(max(code, 0), quantized.scheme.max_code)
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", CLOSED)
def test_closed_form(name, scheme):
    weight, inputs = problem()
    quantizer = solved(name, scheme)
    quantized = quantizer.export()
    assert quantized.codes.shape == weight.shape
    assert quantized.scheme == scheme
    assert int(quantized.codes.max()) <= scheme.max_code
    if scheme.symmetric:
        assert bool((quantized.zero_point == scheme.middle_code).all())
    assert torch.equal(rounded(quantizer.latent, quantized), quantized.codes)
    error = ((inputs @ (quantized.dequantize() - weight).T) ** 2).mean()
    rtn = ((inputs @ (solved("rtn", scheme).export().dequantize() - weight).T) ** 2).mean()
    assert error <= rtn * 1.0001


@pytest.mark.parametrize("name", CLOSED)
def test_solving_stacked_rows_is_solving_each(name):
    weight, _ = problem()
    scheme = QuantScheme(3, 9)
    parts = solved(name, scheme).export().split([3, 4])
    for part, rows in zip(parts, weight.split([3, 4]), strict=True):
        alone = solved(name, scheme, weight=rows).export()
        assert torch.equal(part.codes, alone.codes)
        assert torch.equal(part.scale, alone.scale)


@pytest.mark.parametrize("name", CLOSED)
def test_zero_weights_survive(name):
    weight, _ = problem()
    weight[2] = 0
    quantized = solved(name, QuantScheme(4, 9), weight=weight).export()
    assert bool((quantized.dequantize()[2] == 0).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("init", CLOSED)
@pytest.mark.parametrize("name", VARIANTS, ids=str)
def test_learned(name, init, scheme):
    start = solved(init, scheme, torch.bfloat16)
    quantizer = QUANTIZERS.parse(name).build(start.latent, start.export())
    begun = quantizer.export()
    assert torch.equal(begun.codes, start.export().codes)
    assert torch.equal(begun.scale, start.export().scale)
    weight, inputs = problem()
    optimizer = torch.optim.Adam([p for p in quantizer.parameters() if p.requires_grad], lr=1e-2)
    moved = set()
    for _ in range(3):
        optimizer.zero_grad()
        ((inputs @ (quantizer() - weight).T) ** 2).mean().backward()
        trained = {n: p for n, p in quantizer.named_parameters() if p.requires_grad}
        moved |= {n for n, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    assert moved == set(trained)
    quantizer.eval()
    ended = quantizer.export()
    assert ended.scale.dtype == torch.bfloat16
    assert torch.allclose(quantizer().bfloat16(), ended.dequantize())  # what is trained is what ships
    if scheme.symmetric:
        assert torch.equal(ended.zero_point, begun.zero_point)


def test_an_offset_lifts_weights_that_round_to_zero():
    """A divisor cannot: 0 over anything is 0. The offset can, within half a level."""
    scheme = QuantScheme(4, 9)
    start = solved("rtn", scheme)
    small = start.latent.clone()
    small[:, ::9] *= 1e-3
    for offset in (False, True):
        base = QUANTIZERS.parse("rtn").build(small, scheme, torch.float32)
        base.solve()
        quantizer = QUANTIZERS.parse({"name": "flexround", "offset": offset}).build(small, base.export())
        optimizer = torch.optim.Adam([p for p in quantizer.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(80):
            optimizer.zero_grad()
            (quantizer() - base.export().dequantize() - 1.0)[:, ::9].square().mean().backward()
            optimizer.step()
        moved = quantizer.export().codes[:, ::9] != scheme.middle_code
        assert bool(moved.any()) == offset


def test_dequantize_rounds_once():
    quantized = solved("rtn", QuantScheme(4, 9, symmetric=False), torch.bfloat16).export()
    for o in range(7):
        for i in range(63):
            steps = int(quantized.codes[o, i]) - int(quantized.zero_point[o, i // 9, 0])
            exact = torch.tensor(steps * quantized.scale[o, i // 9, 0].double().item()).bfloat16()
            assert quantized.dequantize()[o, i] == exact
