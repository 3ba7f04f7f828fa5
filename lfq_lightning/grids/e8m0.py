"""E8M0: a power of two per group."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids.scale_codec import ScaleCodec

BIAS = 127


@final
@dataclass(frozen=True)
class E8M0(ScaleCodec):
    """2^(code - 127), codes 0 … 254 (OCP Microscaling formats, version 1.0, section 5.4.1)."""

    signed = False

    def ship(self, value: Tensor) -> Tensor:
        return torch.ldexp(torch.ones_like(value), self.stored(value).int() - BIAS)

    def stored(self, value: Tensor) -> Tensor:
        """Return the codes uint8 (O, G, 1) of the powers nearest in ratio."""
        return (value.clamp(min=2.0**-126).log2().round() + BIAS).clamp(1, 2 * BIAS).to(torch.uint8)

    def bits(self, group_size: int) -> float:
        return 8 / group_size

    def neighbours(self, value: Tensor) -> list[Tensor]:
        return [self.ship(value * 2), self.ship(value / 2)]
