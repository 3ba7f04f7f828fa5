"""GPTQ against the textbook: one column at a time, with the inverse Hessian recomputed each time, in fp64."""

import logging

import pytest
import torch

from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.grids.search_scale import search_scale
from lfq_lightning.quantizers.gptq import GPTQ

ROWS, COLUMNS = 5, 21


def inputs(tokens=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)


def textbook(weight, x, scheme, act_order, damp):
    """Optimal brain quantisation in a fixed order (GPTQ, equations 2 and 3)."""
    scale, zero = (value.double() for value in search_scale(weight, scheme, torch.float32, ratios=20))
    hessian, size = x.double().T @ x.double(), scheme.group_of(COLUMNS)
    groups = [list(range(start, start + size)) for start in range(0, COLUMNS, size)]
    if act_order == "group":
        groups.sort(key=lambda group: -sum(hessian[c, c].item() for c in group))
        left = [c for group in groups for c in sorted(group, key=lambda c: -hessian[c, c].item())]
    elif act_order == "static":
        left = sorted(range(COLUMNS), key=lambda c: -hessian[c, c].item())
    else:
        left = list(range(COLUMNS))
    hessian += damp * hessian.diagonal().mean() * torch.eye(COLUMNS)
    work, codes = weight.double().clone(), torch.empty(ROWS, COLUMNS)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        c, group = left[0], left[0] // size
        if act_order == "group" and len(left) % size == 0:
            part = work[:, left[:size]].float()
            found = search_scale(part, IntegerGrid(scheme.num_bits, -1, scheme.symmetric), torch.float32, ratios=20)
            scale[:, group], zero[:, group] = (value.double()[:, 0] for value in found)
        code = ((work[:, c] / scale[:, group, 0]).round() + zero[:, group, 0]).clamp(0, scheme.max_code)
        error = work[:, c] - (code - zero[:, group, 0]) * scale[:, group, 0]
        work[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
        codes[:, c] = code
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", ["static", "group", "none"])
@pytest.mark.parametrize("leaf", [1, 4, 128])
@pytest.mark.parametrize("scheme", [IntegerGrid(3, 7), IntegerGrid(2, -1, symmetric=False), IntegerGrid(4, 3)], ids=str)
def test_same_codes_as_the_textbook(scheme, leaf, act_order, monkeypatch):
    monkeypatch.setattr("lfq_lightning.ops.gptq_solve.reference.SPAN", leaf)
    weight, x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)), inputs()
    quantizer = GPTQ(weight, scheme, torch.float32, act_order=act_order, damp=0.01)
    for part in x.split(77):
        quantizer.observe(part)
    quantizer.solve()
    expected = textbook(weight, x, scheme, act_order, 0.01)
    assert (quantizer.export().codes == expected.byte()).float().mean() >= 0.99  # fp32 may round a tie the other way


@pytest.mark.parametrize("correct", [0.25, 1.0])
@pytest.mark.parametrize("act_order", ["static", "group", "none"])
def test_correction_is_ridge_regression_on_the_reference(correct, act_order):
    """fp64 least squares: min ‖W'x - W(x + correct·(x_fp - x))‖² + λ‖W' - W‖², then the textbook on W'."""
    weight, x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)), inputs()
    reference = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    scheme = IntegerGrid(3, 7, symmetric=False)
    quantizer = GPTQ(weight, scheme, torch.float32, act_order=act_order, correct=correct)
    for part, wanted in zip(x.split(77), reference.split(77), strict=True):
        quantizer.observe(part)
        quantizer.observe_reference(part, wanted)
    quantizer.solve()
    ridge = (0.01 * (x.double() ** 2).sum(0).mean()).sqrt() * torch.eye(COLUMNS, dtype=torch.float64)
    shift = correct * (reference - x).double() @ weight.double().T
    rows = torch.cat([x.double(), ridge]), torch.cat([shift, torch.zeros(COLUMNS, ROWS, dtype=torch.float64)])
    target = weight + torch.linalg.lstsq(*rows).solution.T.float()
    assert (target - weight).abs().max() > 0.01
    assert (quantizer.export().codes == textbook(target, x, scheme, act_order, 0.01).byte()).float().mean() >= 0.98


def test_an_input_that_is_always_zero_is_rounded_alone():
    x = inputs()
    x[:, 4] = 0
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    quantizer = GPTQ(weight, IntegerGrid(4, 7), torch.float32)
    quantizer.observe(x)
    quantizer.solve()
    assert torch.equal(quantizer.latent[:, 4], weight[:, 4])


def test_damping_grows_and_says_so(caplog):
    weight = torch.randn(ROWS, COLUMNS)
    quantizer = GPTQ(weight, IntegerGrid(4, 7), torch.float32, damp=1e-12)
    quantizer.observe(torch.randn(3, COLUMNS) * 1e3)  # rank 3 of 21
    with caplog.at_level(logging.WARNING):
        quantizer.solve()
    assert "not positive definite" in caplog.text
    assert bool(quantizer.latent.isfinite().all())


def test_broken_inputs_raise():
    quantizer = GPTQ(torch.randn(ROWS, COLUMNS), IntegerGrid(4, 7), torch.float32)
    quantizer.observe(torch.full((4, COLUMNS), float("nan")))
    with pytest.raises(ArithmeticError, match="indefinite"):
        quantizer.solve()


def test_bf16_inputs_are_summed_in_fp32():
    x = inputs(2000).bfloat16()
    quantizer = GPTQ(torch.randn(ROWS, COLUMNS), IntegerGrid(4, 7), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantizer.observe(x)
    exact = x.double().T @ x.double()
    assert (quantizer.hessian.double() - exact).norm() < 1e-5 * exact.norm()


def test_scales_by_the_diagonal():
    """By hand: of the candidates, each group takes the one with the least Σ h·e²."""
    x, weight = inputs() * torch.linspace(0.1, 4, COLUMNS), torch.randn(ROWS, COLUMNS)
    scheme = IntegerGrid(3, 7, symmetric=False)
    quantizer = GPTQ(weight, scheme, torch.float32, scale_by="diagonal")
    quantizer.observe(x)
    h = (x.double() ** 2).sum(0)
    quantizer.solve()
    ours = quantizer.export()
    for o in range(ROWS):
        for g in range(3):
            part, share = weight[o, 7 * g : 7 * g + 7].double(), h[7 * g : 7 * g + 7]
            low, high = min(part.min().item(), 0), max(part.max().item(), 0)
            found = []
            for ratio in torch.linspace(1.0, 0.5, 20).tolist():
                scale = (high - low) * ratio / 7
                zero = round(-low * ratio / scale)
                codes = [min(max(round(w / scale) + zero, 0), 7) for w in part.tolist()]
                errors = [(code - zero) * scale - w for code, w in zip(codes, part.tolist(), strict=True)]
                found.append((sum(s * e * e for s, e in zip(share.tolist(), errors, strict=True)), scale))
            assert ours.scale[o, g, 0] == pytest.approx(min(found)[1], rel=1e-5)
