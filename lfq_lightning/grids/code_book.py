"""CodeBook: levels that are listed, times a scale."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids.levels import Bracket, Levels
from lfq_lightning.ops.fake_quant import LevelTerms, level_tensor
from lfq_lightning.ops.fake_quant.reference import fake_quantize_to, nearest
from lfq_lightning.ops.soft_round.reference import soft_round_between


@final
@dataclass(frozen=True)
class CodeBook(Levels):
    """Any rising numbers, 0 or not among them; a group has no zero of its own.

    Args:
        numbers: the levels, rising.
    """

    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        assert all(low < high for low, high in pairwise(self.numbers))

    @property
    def max_code(self) -> int:  # type: ignore[override]
        return len(self.numbers) - 1

    @property
    def reach(self) -> float:
        return max(map(abs, self.numbers))

    def round(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return self._nearest(weight / scale).float()

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return self.of(codes).mul_(scale)

    def of(self, codes: Tensor) -> Tensor:
        return self._book(codes)[codes.long()]

    def from_zero(self, level: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return level

    def codes(self, weight: Tensor | LevelTerms, scale: Tensor, zero: Tensor) -> Tensor:
        return self._nearest(level_tensor(weight, scale)).to(torch.uint8)

    def fake_quantize(self, weight: Tensor | LevelTerms, scale: Tensor, zero: Tensor) -> Tensor:
        return fake_quantize_to(self._book(scale), level_tensor(weight, scale), scale)

    def bracket(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Bracket:
        ratio, book = weight / scale, self._book(weight)
        below = (torch.bucketize(ratio, book, right=True) - 1).clamp_(0, self.max_code - 1)
        low = book[below]
        gap = book[below + 1] - low
        return low, gap, (ratio - low) / gap, self._nearest(ratio) > below

    def soft_round(
        self, position: Tensor, scale: Tensor, zero: Tensor, low: Tensor, gap: Tensor | None, sharpness: float
    ) -> Tensor:
        assert gap is not None
        return soft_round_between(position, scale, low, gap, sharpness)

    def as_columns(self, zero: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return zero, None, self._book(zero)

    def _book(self, like: Tensor) -> Tensor:
        return _tensor(self.numbers, like.device)

    def _nearest(self, ratio: Tensor) -> Tensor:
        return nearest(self._book(ratio), ratio)


@cache
def _tensor(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a check may ask first, and training later
        return torch.tensor(numbers, dtype=torch.float32, device=device)
