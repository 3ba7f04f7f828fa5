"""Quantise-dequantise with gradients in plain PyTorch (any device)."""

from typing import Any

import torch
from torch import Tensor

from lfq_lightning.ops.fake_quant.level_terms import LevelTerms


def fake_quantize(levels: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Return (clip(round(levels) + zero, 0, max_code) - zero)·scale; straight through the round, not the clip.

    Args:
        levels: (O, G, K), weights in units of the scale.
        scale: (O, G, 1).
        zero: (O, G, 1), whole numbers.
        max_code: the largest code.
    """
    return _FakeQuantize.apply(levels, scale, zero, max_code)


def codes(levels: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Return clip(round(levels) + zero, 0, max_code), uint8 (O, G, K): the codes of what `fake_quantize` returns."""
    return levels.round().add_(zero).clamp_(0, max_code).to(torch.uint8)


def nearest(book: Tensor, levels: Tensor) -> Tensor:
    """Return which of the rising numbers in `book` is next to each level: int64 of any shape; the lower one of two."""
    return torch.bucketize(levels, (book[1:] + book[:-1]) / 2)


def fake_quantize_to(book: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Return the numbers in `book` next to levels (O, G, K), times scale (O, G, 1); gradient as of `fake_quantize`."""
    return _FakeQuantizeTo.apply(book, levels, scale)


def level_tensor(terms: LevelTerms, scale: Tensor) -> Tensor:
    """Return the sum of the terms, fp32 (O, G, K), differentiable in all but `latent` and `unit`."""
    if terms.log_divisor is not None:
        levels = _Divide.apply(terms.latent, scale, terms.log_divisor, terms.row_log_divisor)
    else:
        levels = terms.latent / scale
    if terms.shift is not None and terms.unit is not None:
        levels = levels + terms.shift * (terms.unit / scale)
    if terms.offset is not None:
        levels = levels + terms.offset.clamp(-0.5, 0.5)
    return levels


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, levels: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
        rounded = levels.round().add_(zero)
        inside = (rounded >= 0) & (rounded <= max_code)
        steps = rounded.clamp_(0, max_code).sub_(zero)
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


class _FakeQuantizeTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, book: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        steps = book[nearest(book, levels)]
        inside = (levels >= book[0]) & (levels <= book[-1])
        ctx.save_for_backward(steps, inside, scale)
        return steps * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        steps, inside, scale = ctx.saved_tensors
        return None, (grad * scale).mul_(inside), (grad * steps).sum(-1, keepdim=True)


class _Divide(torch.autograd.Function):
    """latent / (scale · exp(log_divisor + row_log_divisor)): one product with the gradient serves all three."""

    @staticmethod
    def forward(ctx, latent: Tensor, scale: Tensor, log_divisor: Tensor, row_log_divisor: Tensor) -> Tensor:
        levels = (log_divisor + row_log_divisor).neg_().exp_().mul_(latent).div_(scale)
        ctx.save_for_backward(levels, scale)
        return levels

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        levels, scale = ctx.saved_tensors
        by_log = (grad * levels).neg_()
        by_group = by_log.sum(-1, keepdim=True)
        return None, by_group / scale, by_log, by_group.sum(1, keepdim=True)
