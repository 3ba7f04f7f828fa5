"""Soft rounding in plain PyTorch (any device)."""

from typing import Any

import torch
from torch import Tensor


def soft_round(position: Tensor, scale: Tensor, low: Tensor, zero: Tensor, sharpness: float, max_code: int) -> Tensor:
    """Return (clip(low + sigmoid(sharpness·position), 0, max_code) - zero)·scale, differentiable in position and scale.

    Args:
        position: (O, G, K), where each weight stands between its two levels, as a logit.
        scale: (O, G, 1).
        low: (O, G, K), the lower level as a code, whole numbers.
        zero: (O, G, 1), whole numbers.
        sharpness: what positions are multiplied by.
        max_code: the largest code.
    """
    return _SoftRound.apply(position, scale, low, zero, sharpness, max_code)


def soft_round_between(position: Tensor, scale: Tensor, low: Tensor, gap: Tensor, sharpness: float) -> Tensor:
    """Return (low + gap·sigmoid(sharpness·position))·scale, differentiable in position and scale.

    Args as of `soft_round`, but for `low`, the lower level itself, and `gap` (O, G, K), how far it is to the upper one.
    """
    return _SoftRoundBetween.apply(position, scale, low, gap, sharpness)


class _SoftRound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, position: Tensor, scale: Tensor, low: Tensor, zero: Tensor, sharpness: float, max_code: int
    ) -> Tensor:
        up = (position * sharpness).sigmoid_()
        codes = low + up
        inside = (codes >= 0) & (codes <= max_code)
        steps = codes.clamp_(0, max_code).sub_(zero)
        slope = (1 - up).mul_(up).mul_(inside)
        ctx.save_for_backward(steps, slope, scale)
        ctx.sharpness = sharpness
        return steps * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:
        return *_gradients(ctx, grad), None, None, None, None


class _SoftRoundBetween(torch.autograd.Function):
    @staticmethod
    def forward(ctx, position: Tensor, scale: Tensor, low: Tensor, gap: Tensor, sharpness: float) -> Tensor:
        up = (position * sharpness).sigmoid_()
        steps = torch.addcmul(low, up, gap)
        slope = (1 - up).mul_(up).mul_(gap)
        ctx.save_for_backward(steps, slope, scale)
        ctx.sharpness = sharpness
        return steps * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:
        return *_gradients(ctx, grad), None, None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of position and scale."""
    steps, slope, scale = ctx.saved_tensors
    by_scale = (grad * steps).sum(-1, keepdim=True)
    return (grad * slope).mul_(scale * ctx.sharpness), by_scale
