"""Levels: what codes stand for, and how weights are rounded to it."""

from abc import ABC, abstractmethod

from torch import Tensor

from lfq_lightning.ops.fake_quant import LevelTerms

Bracket = tuple[Tensor, Tensor | None, Tensor, Tensor]


class Levels(ABC):
    """A rising sequence of numbers, times a scale; codes count them from 0. All tensors fp32, weights (O, G, K).

    Attributes:
        max_code: the largest code.
        reach: a weight of this many scales, of either sign, is in range.
    """

    max_code: int

    @property
    def reach(self) -> float:
        return self.max_code / 2

    @abstractmethod
    def round(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the codes of the levels next to a weight, as whole numbers."""

    @abstractmethod
    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the weight that codes stand for."""

    def of(self, codes: Tensor) -> Tensor:
        """Return the levels that codes count; whole numbers are the codes themselves."""
        return codes.float()

    @abstractmethod
    def from_zero(self, level: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return levels as weights in units of the scale."""

    @abstractmethod
    def codes(self, weight: Tensor | LevelTerms, scale: Tensor, zero: Tensor) -> Tensor:
        """Return uint8 codes of weights that are in units of the scale: of what `fake_quantize` returns."""

    @abstractmethod
    def fake_quantize(self, weight: Tensor | LevelTerms, scale: Tensor, zero: Tensor) -> Tensor:
        """Return what a weight in units of the scale is rounded to; straight through the rounding, not the clip.

        Differentiable in the weight, the scale and the zero. Terms on a GPU come in the autocast dtype if that is on.
        """

    @abstractmethod
    def bracket(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Bracket:
        """Return the level below a weight, its distance to the next (None: 1), where between them the weight lies, as a
        share of that distance, and whether it rounds up."""

    @abstractmethod
    def soft_round(
        self, position: Tensor, scale: Tensor, zero: Tensor, low: Tensor, gap: Tensor | None, sharpness: float
    ) -> Tensor:
        """Return the weight at low + gap·sigmoid(sharpness·position), differentiable in position, scale and zero."""

    def as_columns(self, zero: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what GPTQ's inner loop needs for a grid whose zeros are `zero`, of any shape.

        A whole zero; a minimum, which is to be added to the weight; the levels, if they are no whole numbers.
        """
        return zero, None, None
