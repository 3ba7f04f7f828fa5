"""E2M1: the fifteen numbers of four bits with two of exponent and one of mantissa."""

import torch
from torch import Tensor

from lfq_lightning.grids.code_book import CodeBook
from lfq_lightning.grids.ggml_grid import from_nibbles, nibbles

_POSITIVE = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ZERO = len(_POSITIVE)  # the code of 0: codes rise with the number, bits have a sign

E2M1 = CodeBook((*(-number for number in reversed(_POSITIVE)), 0.0, *_POSITIVE))


def to_bytes(codes: Tensor) -> Tensor:
    """Return codes uint8 (O, I) as the bits of their numbers, two to a byte, the first one low: (O, I / 2)."""
    signed = codes.short() - _ZERO
    bits = (signed.abs() + 8 * (signed < 0)).to(torch.uint8)
    return nibbles(bits.unflatten(-1, (-1, 2)), 1).flatten(-2)


def from_bytes(stored: Tensor) -> Tensor:
    """Invert `to_bytes`; -0 is 0."""
    bits = from_nibbles(stored[..., None]).flatten(-2).short()
    return (torch.where(bits >= 8, 8 - bits, bits) + _ZERO).to(torch.uint8)
