"""AdaRound's soft rounding in one kernel against autograd on the formula in fp64."""

import pytest
import torch
from torch import Tensor

from lfq_lightning.ops.soft_round import reference

kernel = pytest.importorskip("lfq_lightning.ops.soft_round.triton")

SHAPES = [(3, 1, 63), (5, 2, 100), (1, 1, 4097), (7, 3, 32), (2, 3, 96)]


def problem(shape: tuple[int, int, int], max_code: int, device: torch.device) -> list[Tensor]:
    seed = torch.Generator().manual_seed(shape[0])
    position, low = torch.randn(shape, generator=seed), torch.randint(-1, max_code + 1, shape, generator=seed).float()
    scale = torch.randn(*shape[:2], 1, generator=seed)
    zero = torch.randint(0, max_code + 1, (*shape[:2], 1), generator=seed).float()
    return [t.to(device) for t in (position, scale, low, zero)]


def formula(position: Tensor, scale: Tensor, low: Tensor, zero: Tensor, sharpness: float, max_code: int) -> Tensor:
    return ((low + (position * sharpness).sigmoid()).clamp(0, max_code) - zero) * scale


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's sigmoid far below 0
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", [kernel.soft_round, reference.soft_round], ids=["kernel", "reference"])
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, sharpness, way, kernel_device):
    given = problem(shape, 7, kernel_device)
    exact = [t.double() for t in given]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    for tensors in (given, exact):
        tensors[0].requires_grad_()
        tensors[1].requires_grad_()
    wanted = formula(*exact, sharpness, 7)
    wanted.backward(grad.double())
    found = way(*given, sharpness, 7)
    found.backward(grad)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(given[:2], exact[:2], strict=True):
        assert mine.grad is not None and theirs.grad is not None
        size = float(theirs.grad.abs().max()) * shape[2] ** 0.5
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=2e-6 * size)


def test_autocast_dtype_and_well_formed(kernel_device):
    dtype = torch.bfloat16 if kernel_device.type == "cuda" else torch.float16  # the interpreter's bf16 is not IEEE's
    given = problem((6, 2, 64), 7, kernel_device)
    given[0].requires_grad_()
    full = kernel.soft_round(*given, 3.0, 7)
    with torch.autocast(kernel_device.type, dtype):
        half = kernel.soft_round(*given, 3.0, 7)
    assert half.dtype == dtype and torch.equal(half, full.to(dtype))
    half.sum().backward()
    assert given[0].grad is not None and given[0].grad.dtype == torch.float32
    torch.library.opcheck(kernel._soft_round, (*given, 3.0, 7, torch.float32))
