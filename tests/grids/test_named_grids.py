"""The contract of every registered grid: what can be stored, rounding, gradients, bytes as others read them."""

import gguf
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.round_to_nearest import round_to_nearest
from lfq_lightning.grids.search_scale import search_scale
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, ClosedFormQuantizer, LearnedQuantizer

GRID_NAMES = GRIDS.names()
ONE_OF_A_KIND = ("affine", "iq4_xs", "mxfp4", "nvfp4", "q2_k", "q3_k")  # of levels and codecs
CLOSED = [name for name in QUANTIZERS.names() if issubclass(QUANTIZERS.get(name), ClosedFormQuantizer)]
LEARNED = [name for name in QUANTIZERS.names() if issubclass(QUANTIZERS.get(name), LearnedQuantizer)]
DTYPE = torch.bfloat16  # of the checkpoint; no named grid asks for it


def grid_of(name, weight=None):
    grid = GRIDS.get(name)()
    return grid if weight is None else grid.fitted(weight)


def random_weight(rows=6, columns=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 0.1
    return weight * (1 + 3 * (torch.rand(rows, columns, generator=generator) > 0.98))


def searched(weight, grid, ratios=20):
    scale, zero = search_scale(weight, grid, DTYPE, ratios)
    return scale.float(), zero.float()


def random_pair(grid, rows, columns, seed, size):
    """Return what a group may have, over many orders of magnitude, zeros and both signs included."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns // grid.group_size, 1)
    scale = torch.randn(shape, generator=generator).exp() * 10.0**size
    scale *= (torch.rand(shape, generator=generator) > 0.1) * torch.where(
        torch.rand(shape, generator=generator) > 0.5, 1, -1 if grid.scales.signed else 1
    )
    zero = torch.rand(shape, generator=generator) * 10.0**size * (torch.rand(shape, generator=generator) > 0.2)
    return scale, zero if grid.minima else torch.full(shape, grid.zero)


def random_quantized(name, rows, columns, seed, size=-2):
    grid = grid_of(name)
    scale, zero = grid.ship(*random_pair(grid, rows, columns, seed, size), DTYPE)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, grid.max_code + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    return QuantizedTensor(codes, *grid.stored(scale, zero, DTYPE), grid)


@pytest.mark.parametrize("name", GRID_NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(-9, 1), rows=st.integers(1, 4), blocks=st.integers(1, 3))
def test_round_trips_are_exact(name, seed, size, rows, blocks):
    grid = grid_of(name)
    pair = random_pair(grid, rows, 256 * blocks, seed, size)
    scale, zero = grid.ship(*pair, DTYPE)
    again = grid.ship(scale, zero, DTYPE)
    assert torch.equal(again[0], scale) and torch.equal(again[1], zero)
    assert bool((scale != 0).all()) and bool(scale.isfinite().all())
    quantized = random_quantized(name, rows, 256 * blocks, seed, size)
    stored = grid.pack(quantized.codes, quantized.scale, quantized.zero_point)
    wanted = {last: (dtype or DTYPE, shape) for last, (dtype, shape) in grid.layout(quantized.codes.shape).items()}
    assert {last: (t.dtype, tuple(t.shape)) for last, t in stored.items()} == wanted
    found, *parts = grid.unpack(stored)
    assert found == grid
    for part, wanted in zip(parts, (quantized.codes, quantized.scale, quantized.zero_point), strict=True):
        assert torch.equal(part, wanted)
    for near in grid.neighbours(scale, zero):
        shipped = grid.ship(*near, DTYPE)
        assert torch.equal(shipped[0], near[0]) and torch.equal(shipped[1], near[1])


@pytest.mark.parametrize("name", GRID_NAMES)
def test_bits_are_the_bytes(name):
    grid = grid_of(name)
    sizes = [
        torch.empty(shape, dtype=dtype or DTYPE).nbytes
        for dtype, shape in grid.layout((64, 512)).values()
        if shape != (1,)
    ]
    assert sum(sizes) * 8 / (64 * 512) == grid.bits_per_weight(512)


@pytest.mark.parametrize("name", [name for name in GRID_NAMES if GRIDS.get(name).format == "ggml"])
def test_blocks_as_the_gguf_package_reads_them(name):
    for seed in range(5):
        quantized = random_quantized(name, 5, 768, seed)
        (stored,) = grid_of(name).pack(quantized.codes, quantized.scale, quantized.zero_point).values()
        theirs = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[name.upper()])
        assert torch.equal(torch.from_numpy(theirs), quantized.dequantize())


@pytest.mark.parametrize(
    ("name", "compressor", "preset"),
    [("nvfp4", NVFP4PackedCompressor, "NVFP4A16"), ("mxfp4", MXFP4PackedCompressor, "MXFP4A16")],
)
def test_tensors_as_compressed_tensors_reads_them(name, compressor, preset):
    for seed in range(5):
        weight = random_weight(seed=seed)
        grid = grid_of(name, weight)
        scale, zero = searched(weight, grid)
        codes = round_to_nearest(weight, scale, zero, grid).to(torch.uint8)
        theirs = compressor.decompress(grid.pack(codes, scale, zero), preset_name_to_scheme(preset, ["Linear"]))
        assert torch.equal(theirs["weight"].float(), QuantizedTensor(codes, scale, zero, grid).dequantize())


@pytest.mark.parametrize("name", GRID_NAMES)
def test_codes_are_the_nearest_levels(name):
    weight = random_weight()
    grid = grid_of(name, weight)
    scale, zero = searched(weight, grid)
    grouped = weight.view(*scale.shape[:2], -1)
    every = torch.arange(grid.max_code + 1).float()
    levels = grid.levels.value(every.expand(*scale.shape[:2], -1), scale, zero).double()
    nearest = (grouped.double()[..., None] - levels[:, :, None]).abs().amin(-1)
    found = grid.levels.value(grid.levels.round(grouped, scale, zero), scale, zero).double()
    assert torch.allclose((found - grouped).abs(), nearest, atol=1e-7)
    steps = grouped / scale
    assert torch.equal(grid.levels.fake_quantize(steps, scale, zero).double(), found)
    codes = grid.levels.codes(steps, scale, zero)
    assert torch.equal(grid.levels.value(codes.float(), scale, zero).double(), found)


@pytest.mark.parametrize("name", GRID_NAMES)
def test_the_search_beats_plain_min_max(name):
    weight = random_weight(rows=32)
    grid = grid_of(name, weight)
    errors = []
    for ratios in (1, 20):
        scale, zero = searched(weight, grid, ratios)
        codes = round_to_nearest(weight, scale, zero, grid).to(torch.uint8)
        errors.append(float((QuantizedTensor(codes, scale, zero, grid).dequantize() - weight).square().mean()))
    assert errors[1] < errors[0] * (0.97 if grid.num_bits < 4 else 1.01)  # wide codes leave little to search


@pytest.mark.parametrize("name", GRID_NAMES)
def test_gradients(name):
    """Of the weight: 1 inside the grid and 0 outside; of scale and zero by the formula of a code that stays."""
    weight = random_weight(rows=3) * 3
    grid = grid_of(name, random_weight(rows=3))
    scale, zero = searched(random_weight(rows=3), grid)
    steps = (weight.view(*scale.shape[:2], -1) / scale).requires_grad_()
    scale.requires_grad_(), zero.requires_grad_()
    found = grid.levels.fake_quantize(steps, scale, zero)
    coefficients = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    by_steps, by_scale, by_zero = torch.autograd.grad(
        (found * coefficients).sum(), (steps, scale, zero), allow_unused=True
    )
    codes = grid.levels.codes(steps.detach(), scale.detach(), zero.detach()).float()
    at_zero = 0.0 if grid.minima else zero.detach()
    raised = steps.detach() + (zero / scale).detach() if grid.minima else steps.detach() + at_zero
    low, high = grid.levels.of(torch.tensor([0, grid.max_code]))
    if hasattr(grid.levels, "numbers"):
        raised, inside = steps.detach(), (steps >= low) & (steps <= high)
    else:
        inside = (raised.round() >= low) & (raised.round() <= high)
    assert 0 < float(inside.float().mean()) < 1
    assert torch.allclose(by_steps, coefficients * scale.detach() * inside)
    distance = grid.levels.of(codes) - at_zero
    if grid.minima:  # a clipped weight moves with the end of its grid
        through = coefficients * inside * (-zero / scale).detach()
        assert torch.allclose(by_scale, (coefficients * distance + through).sum(-1, keepdim=True), atol=1e-4)
        assert torch.allclose(by_zero, (coefficients * (inside.float() - 1)).sum(-1, keepdim=True), atol=1e-4)
    else:
        assert torch.allclose(by_scale, (coefficients * distance).sum(-1, keepdim=True), atol=1e-4)


@pytest.mark.parametrize("name", GRID_NAMES)
def test_soft_rounding_hardens_to_the_codes(name):
    weight = random_weight(rows=3)
    grid = grid_of(name, weight)
    scale, zero = searched(weight, grid)
    grouped = weight.view(*scale.shape[:2], -1)
    low, gap, between, up = grid.levels.bracket(grouped, scale, zero)
    hard = torch.where(up, 1.0, -1.0)
    found = grid.levels.soft_round(hard, scale, zero, low, gap, 1e4)
    nearest = grid.levels.value(grid.levels.round(grouped, scale, zero), scale, zero)
    assert torch.equal(found, nearest)
    inside = (between > 0.01) & (between < 0.99)
    if gap is None:
        inside &= (low >= 0) & (low < grid.max_code)
    soft = grid.levels.soft_round(between.clamp(0.01, 0.99).logit(), scale, zero, low, gap, 1.0)
    assert float(inside.float().mean()) > 0.6
    assert torch.allclose(soft[inside], grouped[inside], atol=1e-6)


@pytest.mark.parametrize("name", GRID_NAMES)
def test_the_gradient_of_soft_rounding(name):
    grid = grid_of(name)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(2, 3, 1, generator=generator) + 0.5
    zero = torch.rand(2, 3, 1, generator=generator) if grid.minima else torch.full((2, 3, 1), grid.zero)
    weight = torch.randn(2, 3, 4, generator=generator) * grid.levels.reach
    low, gap, between, _ = grid.levels.bracket(weight, scale, zero)
    position = between.clamp(0.05, 0.95).logit().double().requires_grad_()
    low, gap = low.double(), None if gap is None else gap.double()
    pair = scale.double().requires_grad_(), zero.double().requires_grad_(grid.minima is not None)
    assert torch.autograd.gradcheck(lambda p, s, z: grid.levels.soft_round(p, s, z, low, gap, 2.0), (position, *pair))


@pytest.mark.parametrize("name", GRID_NAMES)
def test_what_is_trained_can_be_stored(name):
    weight = random_weight()
    grid = grid_of(name, weight)
    scale, zero = searched(weight, grid)
    factor = torch.full_like(scale, 1.02).requires_grad_()
    shift = torch.full_like(scale, 0.1).requires_grad_()
    moved = grid.scaled(scale, zero, DTYPE, factor, None if grid.symmetric else shift)
    high, low = torch.full_like(scale, 0.97).requires_grad_(), torch.full_like(scale, 0.95).requires_grad_()
    wide = grid.stretched(scale, zero, DTYPE, None if grid.symmetric else low, high)
    for pair in (moved, wide):
        for value, again in zip(pair, grid.ship(*(value.detach() for value in pair), DTYPE), strict=True):
            assert torch.equal(value, again)
    by_factor = torch.autograd.grad(moved[0].sum(), factor, retain_graph=True)[0]
    assert torch.allclose(by_factor, scale)
    if not grid.symmetric:
        assert torch.allclose(torch.autograd.grad(moved[1].sum(), shift)[0], scale)
    assert bool((torch.autograd.grad(wide[0].sum(), high)[0] != 0).all())


@pytest.mark.parametrize(
    "grid_name",
    [name if name in ONE_OF_A_KIND else pytest.param(name, marks=pytest.mark.thorough) for name in GRID_NAMES],
)
@pytest.mark.parametrize("init", CLOSED)
def test_every_quantizer_knows_every_grid(init, grid_name):
    """Closed forms beat or equal rounding to nearest; learned ones start from them, learn, and train what ships."""
    weight = random_weight(rows=4)
    grid = grid_of(grid_name, weight)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(600, 512, generator=generator) @ (torch.randn(512, 512, generator=generator) / 512**0.5)

    def solve(name):
        quantizer = QUANTIZERS.parse(name).build(weight, grid, DTYPE)
        if quantizer.needs_inputs:
            quantizer.observe(inputs)
        quantizer.solve()
        return quantizer

    def error(quantized):
        return float((inputs @ (quantized.dequantize() - weight).T).square().mean())

    start = solve(init)
    exported = start.export()
    assert error(exported) <= error(solve("rtn").export()) * 1.0001
    assert torch.equal(round_to_nearest(start.latent, exported.scale, exported.zero_point, grid).byte(), exported.codes)
    for name in LEARNED:
        learned = QUANTIZERS.parse(name).build(start.latent, exported)
        begun = learned.export()
        assert torch.equal(begun.codes, exported.codes) and torch.equal(begun.scale, exported.scale)
        assert torch.equal(begun.zero_point, exported.zero_point)
        trained = [parameter for parameter in learned.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=3e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (inputs @ (learned() - weight).T).square().mean().backward()
            assert all(parameter.grad is not None for parameter in trained)
            optimizer.step()
        learned.eval()
        ended = learned.export()
        assert torch.equal(learned(), ended.dequantize().float())
        shipped = grid.ship(ended.scale.float(), ended.zero_point.float(), DTYPE)
        assert torch.equal(shipped[0], ended.scale) and torch.equal(shipped[1], ended.zero_point)
