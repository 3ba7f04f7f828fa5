"""Half: a number per group in fp16."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids.scale_codec import ScaleCodec

_LEAST = 2.0**-24  # the smallest number above 0


@final
@dataclass(frozen=True)
class Half(ScaleCodec):
    """fp16.

    Args:
        least: what smaller numbers, of either sign, become: a scale is never 0.
    """

    least: float = _LEAST
    signed = True

    def ship(self, value: Tensor) -> Tensor:
        rounded = value.half().float()
        floor = torch.where(rounded < 0, -self.least, self.least)
        return torch.where(rounded.abs() < self.least, floor, rounded)

    def bits(self, group_size: int) -> float:
        return 16 / group_size
