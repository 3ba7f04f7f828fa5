"""What learned quantizers share: rounding with a gradient."""

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


def ship_through(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale or a weight to the dtype that ships and back; the gradient passes as if it had not been rounded."""
    return _StraightThrough.apply(value, value.detach().to(dtype).to(value.dtype))
