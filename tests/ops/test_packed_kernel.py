"""The packed product's kernels against fp64."""

from dataclasses import replace

import pytest
import torch

from lfq_lightning.grids.integer_grid import IntegerGrid
from tests.helpers import random_tensor

kernel = pytest.importorskip("lfq_lightning.ops.packed_matmul.triton")

SHAPES = [
    (33, 2048, 128),
    (33, 512, 128),
    (70, 63, -1),
    (65, 100, -1),
    (64, 192, 96),
    (40, 1000, -1),
    (130, 576, 64),
    (31, 96, 32),
]
ROWS = [1, 8, 13, 17, 70]
CASES = [  # each shape and each number of rows meets both kinds of grid
    (bits, shape, (i + j) % 2 == 0, rows)
    for bits in kernel.WIDTHS
    for i, shape in enumerate(SHAPES)
    for j, rows in enumerate(ROWS)
]


def dtype_of(device: torch.device) -> list[torch.dtype]:
    """Return the dtypes that can be tried: the interpreter's bfloat16 is not IEEE's."""
    return [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float16]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("bits", "shape", "symmetric", "rows"), CASES, ids=str)
def test_product(bits, shape, symmetric, rows, kernel_device):
    outputs, inputs, group = shape
    for dtype in dtype_of(kernel_device):
        quantized = random_tensor(
            outputs, inputs, IntegerGrid(bits, group, symmetric), dtype=dtype, device=kernel_device
        )
        assert kernel.fits(quantized)
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(kernel_device, dtype)
        found = kernel.matmul(x, kernel.tile(quantized))
        steps = quantized.codes.view(outputs, quantized.scale.shape[1], -1).double() - quantized.zero_point.double()
        weight = (steps * quantized.scale.double()).view(outputs, inputs)
        exact = x.double() @ weight.T
        bound = (x.double().abs() @ weight.abs().T) * torch.finfo(dtype).eps
        assert found.dtype == dtype and bool(((found.double() - exact).abs() <= bound + 1e-6).all())


def test_groups_that_are_no_multiple_of_32_do_not_fit():
    assert not kernel.fits(random_tensor(64, 1500, IntegerGrid(4, 300)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("multiprocessors", "most_shared", "outputs", "rows"),
    [(5, 4096, 64, 2), (2, 4096, 300, 2), (1, 4096, 600, 2), (1, 4096, 300, 70), (2, 1, 300, 2)],
    ids=["many programs a block", "unequal", "many blocks a program", "many rows", "too many blocks to share"],
)
def test_programs_share_blocks(multiprocessors, most_shared, outputs, rows, kernel_device, monkeypatch):
    monkeypatch.setattr(kernel, "_multiprocessors", lambda _: multiprocessors)
    monkeypatch.setattr(kernel, "_MOST_SHARED", most_shared)
    quantized = random_tensor(outputs, 960, IntegerGrid(4, 320, symmetric=False), device=kernel_device)
    x = torch.randn(rows, 960, device=kernel_device).half()
    weight = kernel.tile(quantized)
    found = kernel.matmul(x, weight)
    exact = x.double() @ quantized.dequantize().double().T
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=2e-2 * float(found.abs().max()))
    assert torch.equal(found, kernel.matmul(x, weight)), "summed in a fixed order"
    assert not weight.arrivals.any(), "ready for the next product"


def test_one_program_a_block(kernel_device, monkeypatch):
    usual = kernel.block_of
    monkeypatch.setattr(kernel, "block_of", lambda *given: replace(usual(*given), resident=0))
    quantized = random_tensor(70, 960, IntegerGrid(3, 320, symmetric=False), device=kernel_device)
    weight, x = kernel.tile(quantized), torch.randn(2, 960, device=kernel_device).half()
    exact = x.double() @ quantized.dequantize().double().T
    found = kernel.matmul(x, weight)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=2e-2 * float(found.abs().max()))


def test_other_dtypes_are_computed_in_that_of_the_scales(kernel_device):
    weight = kernel.tile(random_tensor(20, 64, IntegerGrid(3, 32), device=kernel_device))
    x = torch.randn(2, 64, device=kernel_device)
    found = kernel.matmul(x, weight)
    assert found.dtype == torch.float32 and torch.equal(found, kernel.matmul(x.half(), weight).float())


def test_no_rows(kernel_device):
    quantized = random_tensor(20, 64, IntegerGrid(3, 32), device=kernel_device)
    nothing = torch.empty(0, 64, dtype=torch.float16, device=kernel_device)
    assert kernel.matmul(nothing, kernel.tile(quantized)).shape == (0, 20)


@pytest.mark.parametrize(("bits", "inputs"), [(2, 4096), (3, 4096), (4, 14336), (8, 1024)])
def test_as_dense_as_the_checkpoint(bits, inputs):
    quantized = random_tensor(8, inputs, IntegerGrid(bits, 128))
    weight = kernel.tile(quantized)
    assert weight.words.nbytes == 8 * inputs * bits // 8
    assert weight.grid.nbytes == 8 * (inputs // 128) * 4


def test_operator_is_well_formed(kernel_device):
    weight = kernel.tile(random_tensor(20, 64, IntegerGrid(3, 32), device=kernel_device))
    x = torch.randn(2, 64, device=kernel_device).half()
    torch.library.opcheck(
        kernel._packed_matmul, (x, weight.words, weight.grid, weight.arrivals, weight.bits, weight.group_size, 1)
    )
