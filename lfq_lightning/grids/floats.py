"""Floats: a number per group in a floating-point dtype."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids.scale_codec import ScaleCodec

_LEAST = 2.0**-24  # the smallest fp16 above 0


@final
@dataclass(frozen=True)
class Floats(ScaleCodec):
    """fp16, or another dtype.

    Args:
        least: what smaller numbers, of either sign, become: a scale is never 0.
        dtype: the dtype.
    """

    least: float = _LEAST
    dtype: torch.dtype = torch.float16
    signed = True

    def ship(self, value: Tensor) -> Tensor:
        rounded = value.to(self.dtype).float()
        floor = torch.where(rounded < 0, -self.least, self.least)
        return torch.where(rounded.abs() < self.least, floor, rounded)

    def bits(self, group_size: int) -> float:
        return 8 * self.dtype.itemsize / group_size
