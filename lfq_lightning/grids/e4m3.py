"""E4M3: a number per group in fp8, under one in fp32 for the whole matrix."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids.scale_codec import ScaleCodec

_LEAST, _MOST = 2.0**-9, 448.0


@final
@dataclass(frozen=True)
class E4M3(ScaleCodec):
    """unit · fp8 (4 bits of exponent, 3 of mantissa), positive.

    Args:
        unit: the number for the whole matrix.
    """

    unit: float
    signed = False

    def ship(self, value: Tensor) -> Tensor:
        return self.stored(value).float() * self.unit

    def stored(self, value: Tensor) -> Tensor:
        """Return what is stored (O, G, 1)."""
        return (value / self.unit).clamp(_LEAST, _MOST).to(torch.float8_e4m3fn)

    def bits(self, group_size: int) -> float:
        return 8 / group_size

    @staticmethod
    def unit_for(largest: float) -> float:
        """Return the power of two with which numbers up to `largest`, and twice that, can be stored."""
        return 2.0 ** torch.tensor(max(largest, 1e-30) * 2 / _MOST).log2().ceil().item()
