"""Four numbers of two bits to a byte, each a stride apart, as llama.cpp's types lay them."""

import torch
from torch import Tensor


def join_two_bits(values: Tensor, stride: int) -> Tensor:
    """Return numbers uint8 < 4 (…, n · 4 · stride) as bytes (…, n · stride), the first stride lowest."""
    return (values.unflatten(-1, (-1, 4, stride)) << _shifts(values)).sum(-2, dtype=torch.uint8).flatten(-2)


def split_two_bits(stored: Tensor, stride: int) -> Tensor:
    """Invert `join_two_bits`."""
    return (stored.unflatten(-1, (-1, 1, stride)) >> _shifts(stored) & 3).flatten(-3)


def _shifts(like: Tensor) -> Tensor:
    return torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=like.device)[:, None]
