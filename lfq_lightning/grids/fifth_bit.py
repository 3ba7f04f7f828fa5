"""Codes of five bits in blocks of 32: the fifth bits of all, then the nibbles (Q5_0, Q5_1)."""

import torch
from torch import Tensor

from lfq_lightning.grids.ggml_grid import bits_to_bytes, bytes_to_bits, from_nibbles, nibbles


def split_fifth_bit(codes: Tensor) -> Tensor:
    """Return codes uint8 < 32 (…, 32) as bytes (…, 20)."""
    return torch.cat([bits_to_bytes((codes >> 4).unflatten(-1, (4, 8))), nibbles(codes & 15)], -1)


def join_fifth_bit(stored: Tensor) -> Tensor:
    """Invert `split_fifth_bit`."""
    return from_nibbles(stored[..., 4:]) | bytes_to_bits(stored[..., :4]).flatten(-2) << 4
