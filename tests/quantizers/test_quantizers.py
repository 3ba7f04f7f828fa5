"""The contract of every registered quantizer, over widths, groups and odd shapes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfq_lightning.errors import UserError
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.optimizers import OPTIMIZERS
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
    IntegerGrid(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (-1, 9, 63) for symmetric in (True, False)
]


WIDE = [IntegerGrid(bits, group, False) for bits, group in ((3, 32), (4, 64), (2, 96), (8, 128))]  # of 384


def problem(rows=7, columns=63):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return weight, torch.randn(500, columns, generator=generator) @ mixing


def solved(name, scheme, dtype=torch.float32, weight=None):
    known, inputs = problem(columns=63 if weight is None else weight.shape[1])
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


@pytest.mark.parametrize("scheme", [*SCHEMES, *WIDE], ids=str)
@pytest.mark.parametrize("name", CLOSED)
def test_closed_form(name, scheme):
    weight, inputs = problem(columns=384 if scheme in WIDE else 63)
    quantizer = solved(name, scheme, weight=weight)
    quantized = quantizer.export()
    assert quantized.codes.shape == weight.shape
    assert quantized.scheme == scheme
    assert int(quantized.codes.max()) <= scheme.max_code
    if scheme.symmetric:
        assert bool((quantized.zero_point == scheme.middle_code).all())
    again = solved(name, scheme, weight=weight).export()
    assert torch.equal(again.codes, quantized.codes) and torch.equal(again.scale, quantized.scale)
    assert torch.equal(rounded(quantizer.latent, quantized), quantized.codes)
    error = ((inputs @ (quantized.dequantize() - weight).T) ** 2).mean()
    rtn = ((inputs @ (solved("rtn", scheme, weight=weight).export().dequantize() - weight).T) ** 2).mean()
    assert error <= rtn * 1.0001


@pytest.mark.parametrize("name", CLOSED)
def test_solving_stacked_rows_is_solving_each(name):
    weight, _ = problem()
    scheme = IntegerGrid(3, 9)
    parts = solved(name, scheme).export().split([3, 4])
    for part, rows in zip(parts, weight.split([3, 4]), strict=True):
        alone = solved(name, scheme, weight=rows).export()
        assert torch.equal(part.codes, alone.codes)
        assert torch.equal(part.scale, alone.scale)


@pytest.mark.parametrize("name", CLOSED)
def test_zero_weights_survive(name):
    weight, _ = problem()
    weight[2] = 0
    quantized = solved(name, IntegerGrid(4, 9), weight=weight).export()
    assert bool((quantized.dequantize()[2] == 0).all())


@pytest.mark.parametrize(
    "scheme",
    [pytest.param(s, marks=pytest.mark.thorough) if s.num_bits == 4 or s.group_size == 63 else s for s in SCHEMES],
    ids=str,
)
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
    assert torch.equal(quantizer(), ended.dequantize().float())  # what is trained is what ships
    if scheme.symmetric:
        assert torch.equal(ended.zero_point, begun.zero_point)


def trained(name, scheme, steps=60):
    """Train a toy layer from the quantizer's own start as the plan would; return it, its start, its errors."""
    weight, inputs = problem()
    cls = QUANTIZERS.parse(name).cls
    start = solved(cls.default_init, scheme)
    quantizer = QUANTIZERS.parse(name).build(start.latent, start.export())
    lr = OPTIMIZERS[cls.default_optimizer].lr(steps)
    trainable = {n: p for n, p in quantizer.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "lr": lr * cls.rates.get(n, 1.0)} for n, p in trainable.items()]
    optimizer, schedule = OPTIMIZERS[cls.default_optimizer].build(groups, steps, True)
    errors = []
    for step in range(steps):
        quantizer.eval()
        errors.append(float(((inputs @ (quantizer() - weight).T) ** 2).mean().detach()))
        quantizer.train()
        quantizer.anneal(step / steps)
        optimizer.zero_grad()
        ((inputs @ (quantizer() - weight).T) ** 2).mean().backward()
        optimizer.step()
        schedule.step()
    return quantizer.eval(), start, errors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", VARIANTS, ids=str)
def test_the_best_step_beats_the_start_and_rounding_to_nearest(name, symmetric):
    """OmniQuant and SignRound begin at plain min-max as their papers do, so that is theirs; the others' is searched."""
    scheme = IntegerGrid(3, 9, symmetric)
    _, _, errors = trained(name, scheme, steps=300)
    assert min(errors[1:]) < errors[0]
    weight, inputs = problem()
    init = QUANTIZERS.parse(name).cls.default_init
    rtn = solved(init if isinstance(init, dict) else "rtn", scheme)
    assert min(errors) <= ((inputs @ (rtn.export().dequantize() - weight).T) ** 2).mean()


@pytest.mark.parametrize("name", ["omniquant", "signround"])
def test_the_ends_of_a_stretched_grid(name):
    """Each end moves by its own factor, but for the half level by which a whole zero point may miss it."""
    start = solved({"name": "rtn", "ratios": 1}, IntegerGrid(3, 9, symmetric=False))
    quantizer = QUANTIZERS.parse(name).build(start.latent, start.export())
    low, high = torch.rand(2, 7, 7, 1, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5
    scale, zero = quantizer.stretched_grid(low, high)
    before, z = start.export().scale, start.export().zero_point
    assert torch.allclose(7 * scale, before * (z * low + (7 - z) * high), rtol=1e-5)
    assert bool(((zero * scale - z * before * low).abs() <= scale * 0.5001).all())
    assert torch.equal(zero, zero.round()) and not torch.equal(zero, z.float())


@pytest.mark.parametrize("name", ["signround", {"name": "flexround", "offset": True}], ids=str)
def test_what_has_left_its_range_comes_back(name):
    start = solved("rtn", IntegerGrid(3, 9, symmetric=False))
    quantizer = QUANTIZERS.parse(name).build(start.latent, start.export())
    bounded = [p for n, p in quantizer.named_parameters() if n in {"offset", "high", "low"}]
    with torch.no_grad():
        for parameter in bounded:
            parameter.add_(3.0)
    quantizer.anneal(0.5)
    quantizer().square().sum().backward()
    assert bounded and all(bool((p <= 1).all()) and bool(p.grad.abs().sum() > 0) for p in bounded)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "rtn", "ratios": 0},
        {"name": "awq", "clip": -1},
        {"name": "awq", "exponents": 0},
        {"name": "gptq", "ratios": 0},
        {"name": "gptq", "damp": 0.0},
        {"name": "gptq", "damp": 2.0},
        {"name": "gptq", "correct": -0.5},
        {"name": "flexround", "rank": -1},
        {"name": "adaround", "sharpness": 1.0},
    ],
    ids=str,
)
def test_options_out_of_range(wrong):
    plugin, option = QUANTIZERS.parse(wrong), list(wrong)[1]
    with pytest.raises(UserError, match=f"quantizer {wrong['name']}: {option} .* must be"):
        plugin.cls.check(IntegerGrid(4), plugin.options)


def test_codes_off_the_grid_are_refused():
    quantizer = solved("rtn", IntegerGrid(3, 9))
    for code in (8.0, -1.0, float("nan")):
        codes = torch.zeros(7, 63)
        codes[2, 3] = code
        with pytest.raises(ValueError, match="NaN or lie outside 0 … 7"):
            quantizer.quantized(codes, quantizer.scale, quantizer.zero_point)
    with pytest.raises(ValueError, match=r"\(7, 3, 1\) and \(7, 7, 1\), but must be \(7, 7, 1\)"):
        quantizer.quantized(torch.zeros(7, 63), quantizer.scale[:, :3], quantizer.zero_point)


@pytest.mark.parametrize("name", VARIANTS, ids=str)
def test_same_start_same_bytes_and_state_survives(name, tmp_path):
    scheme = IntegerGrid(3, 9, symmetric=False)
    first, start, _ = trained(name, scheme, steps=5)
    second, _, _ = trained(name, scheme, steps=5)
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    third = QUANTIZERS.parse(name).build(start.latent, start.export()).eval()
    third.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for other in (second.export(), third.export()):
        assert torch.equal(first.export().codes, other.codes)
        assert torch.equal(first.export().scale, other.scale)
        assert torch.equal(first.export().zero_point, other.zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_flexround(symmetric):
    """Against autograd of the paper's equation in fp64, with the round written as detached."""
    scheme = IntegerGrid(2, 9, symmetric)
    start = solved("rtn", scheme)
    name = {"name": "flexround", "offset": True, "zero_point": True}
    quantizer = QUANTIZERS.parse(name).build(start.latent, start.export())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    upstream = torch.randn(7, 63)
    (quantizer() * upstream).sum().backward()
    exact = {n: p.detach().double().requires_grad_() for n, p in quantizer.named_parameters() if p.requires_grad}
    scale = start.export().scale.double() * exact["log_s1"].exp()
    zero = start.export().zero_point.double()
    if not symmetric:
        zero = zero + exact["zero_shift"]
        zero = (zero + (zero.round() - zero).detach()).clamp(0, 3)
    ratio = start.latent.double().view(7, 7, 9) / (scale * (exact["log_s2"] + exact["log_s3"]).exp())
    ratio = ratio + exact["offset"].clamp(-0.5, 0.5)
    codes = (ratio + (ratio.round() - ratio).detach() + zero).clamp(0, 3)
    (((codes - zero) * scale).flatten(1) * upstream).sum().backward()
    for label, parameter in quantizer.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad.double() - exact[label].grad).norm()
            assert error <= 1e-4 * exact[label].grad.norm() + 1e-6, label


@pytest.mark.parametrize("scheme", [IntegerGrid(2, 9), IntegerGrid(3, -1, False)], ids=str)
def test_the_gradient_of_flexround_by_hand(scheme):
    """With n = W / (s1 S2 s3): straight through the round, and nothing through the clip."""
    start = solved("rtn", scheme)
    quantizer = QUANTIZERS.parse("flexround").build(start.latent, start.export())
    upstream = torch.randn(7, 63, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        quantizer.log_s2.add_(0.2 * torch.randn(quantizer.log_s2.shape, generator=torch.Generator().manual_seed(3)))
    (quantizer() * upstream).sum().backward()
    size, log_s2 = scheme.group_of(63), quantizer.log_s2.detach()
    by_s1, by_s3 = torch.zeros(7, 63 // size), torch.zeros(7)
    for o in range(7):
        for i in range(63):
            s1, z = start.export().scale[o, i // size, 0], float(start.export().zero_point[o, i // size, 0])
            n = start.latent[o, i] / (s1 * log_s2[o, i // size, i % size].exp())
            code = round(n.item()) + z
            inside = 0 <= code <= scheme.max_code
            clipped = min(max(code, 0), scheme.max_code)
            by_log_divisor = -upstream[o, i] * s1 * n * inside
            assert quantizer.log_s2.grad[o, i // size, i % size] == pytest.approx(
                float(by_log_divisor), rel=1e-4, abs=1e-6
            )
            by_s3[o] += by_log_divisor
            by_s1[o, i // size] += upstream[o, i] * s1 * (clipped - z) + by_log_divisor
    assert torch.allclose(quantizer.log_s1.grad[:, :, 0], by_s1, rtol=1e-4, atol=1e-4)
    assert torch.allclose(quantizer.log_s3.grad[:, 0, 0], by_s3, rtol=1e-4, atol=1e-4)


def test_an_offset_lifts_weights_that_round_to_zero():
    """A divisor cannot: 0 over anything is 0. The offset can, within half a level."""
    scheme = IntegerGrid(4, 9)
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


@pytest.mark.parametrize("shape", [(7, 63), (5, 64), (36, 288), (3, 1000)])
def test_nf4_by_hand(shape):
    """Blocks of 64 of the flat weight, each value to the nearest of the 16 levels of QLoRA (appendix E)."""
    levels = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    levels += [0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.5626170, 0.72295684, 1.0]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = QUANTIZERS.parse("nf4").build(weight, IntegerGrid(4)).export()
    assert ours.shape == weight.shape
    for block, quantised in zip(weight.flatten().split(64), ours.flatten().split(64), strict=True):
        largest = block.abs().max()
        nearest = (block[:, None] / largest - torch.tensor(levels)).abs().argmin(1)
        assert torch.allclose(quantised, torch.tensor(levels)[nearest] * largest, rtol=1e-3, atol=1e-3)


def test_dequantize_rounds_once():
    quantized = solved("rtn", IntegerGrid(4, 9, symmetric=False), torch.bfloat16).export()
    for o in range(7):
        for i in range(63):
            steps = int(quantized.codes[o, i]) - int(quantized.zero_point[o, i // 9, 0])
            exact = torch.tensor(steps * quantized.scale[o, i // 9, 0].double().item()).bfloat16()
            assert quantized.dequantize()[o, i] == exact
