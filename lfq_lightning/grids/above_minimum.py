"""AboveMinimum: code · scale - minimum."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids.levels import Bracket, Levels
from lfq_lightning.ops.fake_quant import LevelTerms, codes, fake_quantize, level_tensor
from lfq_lightning.ops.soft_round import soft_round


@final
@dataclass(frozen=True)
class AboveMinimum(Levels):
    """Whole numbers from 0 to `max_code`, above a minimum that is any number: the zero is what is subtracted."""

    max_code: int

    def round(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (weight + zero).div_(scale).round_().clamp_(0, self.max_code)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (codes * scale).sub_(zero)

    def from_zero(self, level: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return level - zero / scale

    def codes(self, weight: Tensor | LevelTerms, scale: Tensor, zero: Tensor) -> Tensor:
        raised = level_tensor(weight, scale) + zero / scale
        return codes(raised, scale, torch.zeros_like(zero), self.max_code)

    def fake_quantize(self, weight: Tensor | LevelTerms, scale: Tensor, zero: Tensor) -> Tensor:
        raised = level_tensor(weight, scale) + zero / scale
        return fake_quantize(raised, scale, torch.zeros_like(zero), self.max_code).sub_(zero)

    def bracket(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Bracket:
        ratio = (weight + zero) / scale
        low = ratio.floor()
        return low, None, ratio - low, ratio.round() > low

    def soft_round(
        self, position: Tensor, scale: Tensor, zero: Tensor, low: Tensor, gap: Tensor | None, sharpness: float
    ) -> Tensor:
        return soft_round(position, scale, low, torch.zeros_like(zero), sharpness, self.max_code).sub_(zero)

    def as_columns(self, zero: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return torch.zeros_like(zero), zero, None
