"""Integers: (code - zero) · scale, with a whole zero."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lfq_lightning.grids.levels import Bracket, Levels
from lfq_lightning.ops.fake_quant import LevelTerms, codes, fake_quantize
from lfq_lightning.ops.soft_round import soft_round


@final
@dataclass(frozen=True)
class Integers(Levels):
    """Whole numbers from 0 to `max_code`, and a zero that is one of them."""

    max_code: int

    def round(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (weight / scale).round_().add_(zero).clamp_(0, self.max_code)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (codes - zero).mul_(scale)

    def from_zero(self, level: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return level - zero

    def codes(self, weight: Tensor | LevelTerms, scale: Tensor, zero: Tensor) -> Tensor:
        return codes(weight, scale, zero, self.max_code)

    def fake_quantize(self, weight: Tensor | LevelTerms, scale: Tensor, zero: Tensor) -> Tensor:
        return fake_quantize(weight, scale, zero, self.max_code)

    def bracket(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Bracket:
        ratio = weight / scale
        low = ratio.floor()
        return low + zero, None, ratio - low, ratio.round() > low

    def soft_round(
        self, position: Tensor, scale: Tensor, zero: Tensor, low: Tensor, gap: Tensor | None, sharpness: float
    ) -> Tensor:
        return soft_round(position, scale, low, zero, sharpness, self.max_code)
