"""The fused quantise-dequantise against the plain one in fp64: values, codes and all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lfq_lightning.ops.fake_quant import LevelTerms, reference

triton_kernel = pytest.importorskip("lfq_lightning.ops.fake_quant.triton")

KINDS = ("plain", "flexround", "flexround offset", "signround", "block_ap")
SHAPES = [(3, 1, 63), (5, 2, 100), (2, 1, 1000), (1, 1, 4097), (7, 3, 32), (33, 2, 64), (4, 2, 128), (2, 3, 96)]
EDGE = 1e-3  # levels this near to a half may round either way in fp32


def terms_of(kind: str, shape: tuple[int, int, int], device: torch.device) -> tuple[LevelTerms, Tensor, Tensor]:
    o, g, _ = shape
    seed = torch.Generator().manual_seed(o * 31 + g)

    def random(*size: int, by: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=seed) * by).to(device)

    scale = random(o, g, 1).sign() * (random(o, g, 1).abs() + 0.3)
    zero = torch.randint(0, 8, (o, g, 1), generator=seed).float().to(device)
    latent = random(*shape, by=2.0)
    flexround = {"log_divisor": random(*shape, by=0.2), "row_log_divisor": random(o, 1, 1, by=0.1)}
    options: dict[str, dict[str, Tensor]] = {
        "plain": {},
        "flexround": flexround,
        "flexround offset": {**flexround, "offset": random(*shape, by=0.4)},
        "signround": {"offset": random(*shape, by=0.4)},
        "block_ap": {"shift": random(*shape, by=0.4), "unit": random(o, g, 1).abs() + 0.1},
    }
    return LevelTerms(latent, **options[kind]), scale, zero


def leaves(terms: LevelTerms, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[LevelTerms, dict[str, Tensor]]:
    """Return the terms in `dtype`, and all that has a gradient by name."""
    copies = {name: value.to(dtype) for name, value in vars(terms).items() if value is not None}
    found = {name: t.requires_grad_() for name, t in copies.items() if name not in ("latent", "unit")}
    found |= {"scale": scale.to(dtype).requires_grad_(), "zero": zero.to(dtype).requires_grad_()}
    return LevelTerms(**copies), found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("max_code", [3, 7, 255])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(
    kind: str, shape: tuple[int, int, int], max_code: int, kernel_device: torch.device
) -> None:
    made = terms_of(kind, shape, kernel_device)
    exact, exact_leaves = leaves(*made, torch.float64)
    levels = reference.level_tensor(exact, exact_leaves["scale"])
    wanted = reference.fake_quantize(levels, exact_leaves["scale"], exact_leaves["zero"], max_code)
    sure = ((levels - levels.floor() - 0.5).abs() > EDGE).detach()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(kernel_device) * sure
    wanted.backward(grad.double())

    terms, own = leaves(*made, torch.float32)
    found = triton_kernel.fake_quantize(terms, own["scale"], own["zero"], max_code)
    found.backward(grad)

    assert sure.float().mean() > 0.9
    torch.testing.assert_close(found[sure].double(), wanted[sure], rtol=1e-5, atol=1e-5)
    for name, leaf in own.items():
        expected = exact_leaves[name].grad
        assert leaf.grad is not None and expected is not None
        size = (float(expected.abs().max()) + 1.0) * shape[2] ** 0.5
        torch.testing.assert_close(
            leaf.grad.double(), expected, rtol=1e-5, atol=1e-6 * size, msg=lambda text, name=name: f"{name}: {text}"
        )
    codes = triton_kernel.codes(terms, own["scale"], own["zero"], max_code)
    again = (codes.float() - own["zero"]) * own["scale"]
    assert torch.equal(again, found), "what ships is what was trained"


def test_untouched_start_is_exact(kernel_device: torch.device) -> None:
    """With all logs 0, codes are those of the division alone, ties included: training starts at `init`'s codes."""
    levels = torch.arange(-40, 40, device=kernel_device).view(2, 2, 20) / 4  # whole, halves and quarters
    scale = torch.tensor([0.125, 3.0, 0.7, 1.1], device=kernel_device).view(2, 2, 1)
    latent, zero = levels * scale, torch.full_like(scale, 8.0)
    nothing = torch.zeros_like(latent)
    terms = LevelTerms(latent, nothing, torch.zeros(2, 1, 1, device=kernel_device), nothing)
    found = triton_kernel.codes(terms, scale, zero, 15)
    assert torch.equal(found, reference.codes(reference.level_tensor(terms, scale), zero, 15))


def test_autocast_dtype_and_its_gradient(kernel_device: torch.device) -> None:
    dtype = torch.bfloat16 if kernel_device.type == "cuda" else torch.float16  # the interpreter's bf16 is not IEEE's
    terms, scale, zero = terms_of("flexround offset", (6, 2, 64), kernel_device)
    terms, own = leaves(terms, scale, zero, torch.float32)
    full = triton_kernel.fake_quantize(terms, own["scale"], own["zero"], 7)
    with torch.autocast(kernel_device.type, dtype):
        half = triton_kernel.fake_quantize(terms, own["scale"], own["zero"], 7)
    assert half.dtype == dtype and torch.equal(half, full.to(dtype))
    half.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in own.values())


def test_operator_is_well_formed(kernel_device: torch.device) -> None:
    terms, scale, zero = terms_of("flexround offset", (6, 2, 64), kernel_device)
    terms, own = leaves(terms, scale, zero, torch.float32)
    arguments: tuple[Any, ...] = triton_kernel._arguments(terms, own["scale"], own["zero"])
    torch.library.opcheck(triton_kernel._fake_quant, (*arguments, 7, torch.float32))
    first, second = (triton_kernel.fake_quantize(terms, own["scale"], own["zero"], 7) for _ in range(2))
    assert torch.equal(first, second)
