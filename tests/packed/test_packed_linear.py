"""PackedLinear against fp64: both paths, awkward shapes, small and large batches."""

import pytest
import torch

from lfq_lightning.errors import UserError
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.ops.packed_matmul import cpu_int4
from lfq_lightning.packed.packed_linear import PackedLinear
from tests.helpers import random_tensor

INT4 = [
    (100, 96, IntegerGrid(4, 32)),
    (130, 192, IntegerGrid(3, 96, symmetric=False)),
    (64, 64, IntegerGrid(2, -1, symmetric=False)),
    (1, 512, IntegerGrid(4, 512)),
    (576, 576, IntegerGrid(3, 64)),
    (33, 64, IntegerGrid(8, 32)),
    (70, 128, IntegerGrid(8, 64, symmetric=False)),
    (40, 96, IntegerGrid(5, 32, symmetric=False)),
]
OTHERS = [
    (70, 100, IntegerGrid(3, 20, symmetric=False), torch.float32),
    (5, 63, IntegerGrid(5, 9), torch.float16),
    (64, 48, IntegerGrid(4, 16), torch.bfloat16),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=[True, False], ids=["fast in 16 bits", "slow in 16 bits"])
def machine(request, monkeypatch):
    """A CPU of either kind."""
    monkeypatch.setattr("lfq_lightning.precision.faster_than_fp32", lambda dtype: request.param)


def check(layer, quantized, bias, rows, dtype, precision, roundings=2):
    x = torch.randn(*rows, quantized.codes.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = quantized.dequantize().double()
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    found = layer(x)
    assert found.dtype == x.dtype and found.shape == exact.shape
    # the sum of |x||w| is what one rounding of a term is relative to; sums in fp32 round at each step
    eps = torch.finfo(precision).eps
    bound = (x.double().abs() @ weight.abs().T) * eps * roundings + exact.abs() * eps
    assert bool(((found.double() - exact).abs() <= bound + 1e-6).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # of the model, which other dtypes' scales meet in exports
@pytest.mark.parametrize("scales", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (2, 3), (cpu_int4.KERNEL_ROWS + 1,), (0,)], ids=str)
@pytest.mark.parametrize("case", INT4, ids=str)
def test_int4_path(case, rows, scales, dtype, machine):
    if cpu_int4.tile_outputs() is None:
        pytest.skip("this PyTorch has no int4 kernel for this CPU")
    quantized = random_tensor(*case, dtype=scales)
    layer = PackedLinear(quantized, None)
    assert layer.way == "int4 kernel"
    check(layer, quantized, None, rows, dtype, torch.bfloat16)
    if len(rows) == 1 and rows[0] > cpu_int4.KERNEL_ROWS:  # dequantised: as exact as x and the weights are
        exact = {dtype, scales} == {torch.float32}
        check(layer, quantized, None, rows, dtype, *((torch.float32, 16) if exact else (torch.bfloat16,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize("case", INT4, ids=str)
def test_int4_weights_are_those_that_ship(case, tile, dtype, monkeypatch):
    monkeypatch.setattr(cpu_int4, "tile_outputs", lambda: tile)
    quantized = random_tensor(*case, dtype=dtype)
    weight = cpu_int4.Int4Weight(quantized)
    rows = quantized.codes.shape[0]
    parts = [weight.dequantize(start, 128) for start in range(0, rows, 128)]
    assert torch.equal(torch.cat(parts), quantized.dequantize())


def test_a_model_turned_to_fp32_keeps_its_packed_weights():
    quantized = random_tensor(64, 64, IntegerGrid(4, 32), dtype=torch.bfloat16)
    layer = PackedLinear(quantized, torch.randn(64).bfloat16()).float()
    check(layer, quantized, layer.bias, (2,), torch.float32, torch.bfloat16)


@pytest.mark.parametrize("rows", [(1,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_dequantising_path(case, rows, monkeypatch, machine):
    monkeypatch.setattr("lfq_lightning.ops.packed_matmul.reference.TILE_WEIGHTS", 300)  # several tiles
    *shape, dtype = case
    quantized, bias = random_tensor(*shape, dtype=dtype), torch.randn(shape[0]).to(dtype)
    layer = PackedLinear(quantized, bias)
    assert layer.way == "dequantising"
    check(layer, quantized, bias, rows, dtype, dtype)


def test_memory_is_that_of_the_codes():
    quantized = random_tensor(256, 256, IntegerGrid(4, 64), dtype=torch.bfloat16)
    layer = PackedLinear(quantized, None)
    assert sum(buffer.nbytes for buffer in layer.buffers()) <= 256 * 256 // 2 + 256 * 4 * (3 + 4)
    quantized = random_tensor(256, 256, IntegerGrid(8, 64), dtype=torch.bfloat16)
    layer = PackedLinear(quantized, None)
    assert sum(buffer.nbytes for buffer in layer.buffers()) <= 256 * 256 + 256 * 4 * (3 + 8)
    quantized = random_tensor(256, 192, IntegerGrid(3, 48), dtype=torch.float16)
    layer = PackedLinear(quantized, None)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 256 * 192 * 3 // 8 + 256 * 4 * 3


def test_moved_to_another_kind_of_device_says_the_cure():
    layer = PackedLinear(random_tensor(64, 64, IntegerGrid(4, 32), dtype=torch.bfloat16), None).to("meta")
    with pytest.raises(UserError, match=r"packed for cpu and moved to meta; load it there: .*device='meta'"):
        layer(torch.zeros(1, 64, dtype=torch.bfloat16, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [(1,), (2, 3), (129,), (0,)], ids=str)
@pytest.mark.parametrize("case", [*((*c, torch.bfloat16) for c in INT4), *OTHERS], ids=str)
def test_on_a_gpu(case, rows):
    *shape, dtype = case
    quantized = random_tensor(*shape, dtype=dtype, device="cuda")
    layer = PackedLinear(quantized, None)
    x = torch.randn(*rows, shape[1], device="cuda").to(dtype)
    exact = x.double() @ quantized.dequantize().double().T
    size = float(exact.abs().amax()) if exact.numel() else 0.0
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-2, atol=2e-2 * size)
