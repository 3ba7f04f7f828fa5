"""What learned quantizers share: rounding with a gradient."""

from collections.abc import Callable

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


def straight_through(value: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Return rounding(value); the gradient passes as if it had not been rounded."""
    return _StraightThrough.apply(value, rounding(value.detach()))


def round_through(value: Tensor) -> Tensor:
    """Round to nearest; the gradient passes as if it had not been rounded."""
    return straight_through(value, torch.round)


def ship_through(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale or a weight to the dtype that ships and back; the gradient passes as if it had not been rounded."""
    return straight_through(value, lambda number: number.to(dtype).to(value.dtype))
