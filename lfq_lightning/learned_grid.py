"""What learned quantizers share: rounding with a gradient."""

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """A rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_through(value: Tensor) -> Tensor:
    """Round to nearest; the gradient passes as if it had not been rounded."""
    return _StraightThrough.apply(value, value.detach().round())


def ship_through(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale to the dtype that ships and back; the gradient passes as if it had not been rounded."""
    return _StraightThrough.apply(scale, scale.detach().to(dtype).to(scale.dtype))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, levels: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
        codes = levels.round().add_(zero)
        inside = (codes >= 0) & (codes <= most)
        steps = codes.clamp_(0, most).sub_(zero)
        ctx.save_for_backward(steps, inside, scale)
        return steps * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:
        steps, inside, scale = ctx.saved_tensors
        _, wants_scale, wants_zero, _ = ctx.needs_input_grad
        by_scale = (grad * steps).sum(-1, keepdim=True) if wants_scale else None
        whole = grad * scale
        by_levels = whole * inside
        by_zero = (by_levels - whole).sum(-1, keepdim=True) if wants_zero else None
        return by_levels, by_scale, by_zero, None


def fake_quantize(levels: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    """Return (clip(round(levels) + zero, 0, most) - zero)·scale; straight through the round, nothing through the clip.

    Args:
        levels: (O, G, K), weights in units of the scale.
        scale: (O, G, 1).
        zero: (O, G, 1), whole numbers.
        most: the largest code.
    """
    return _FakeQuantize.apply(levels, scale, zero, most)
