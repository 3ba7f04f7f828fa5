"""Grid: what the weights of a matrix are rounded to."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lfq_lightning.grids.levels import Levels

Pair = tuple[Tensor, Tensor]  # scale and zero, each (O, G, 1)


class Grid(ABC):
    """Levels times a scale, and where 0 lies, for each group of K consecutive inputs of a weight (O, I), I = G·K.

    A weight on a grid is codes (O, I), a scale (O, G, 1), and a zero (O, G, 1): the code of 0 where that is a whole
    number, or a minimum that is subtracted. What of these can be stored differs from grid to grid: `ship` rounds to it,
    and all quantizers solve and train on what it returns. They know grids by this contract alone.

    Attributes:
        num_bits: width of a code in memory.
        group_size: inputs that share one scale; -1 is all of them (per output channel).
        unit: inputs that are stored together, which divide the width of a weight; -1 is all of them.
        symmetric: a group has nothing of its own but its scale.
        levels: what codes stand for.
    """

    num_bits: int
    group_size: int
    unit: int
    symmetric: bool
    levels: Levels

    @property
    def max_code(self) -> int:
        return self.levels.max_code

    def divides(self, in_features: int) -> bool:
        """Tell whether what is stored together divides the inputs of a weight."""
        return self.unit == -1 or in_features % self.unit == 0

    def group_of(self, in_features: int) -> int:
        """Return the number of inputs K per group of a weight with `in_features`. Raises ValueError if none fits."""
        if not self.divides(in_features):
            raise ValueError(f"group_size {self.unit} does not divide {in_features} inputs")
        return in_features if self.group_size == -1 else self.group_size

    def fitted(self, weight: Tensor) -> "Grid":
        """Return this grid for a whole weight (O, I), which may fix one number: the scale of its scales."""
        return self

    @abstractmethod
    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Return code bits plus the share per weight of all else that is stored; `scale_bits` of the model's dtype."""

    @abstractmethod
    def stored(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Pair:
        """Return a pair that can be stored in the dtypes in which a QuantizedTensor holds it."""

    @abstractmethod
    def candidates(self, low: Tensor, high: Tensor, dtype: torch.dtype, ratio: float, both_zeros: bool) -> list[Pair]:
        """Return pairs fp32 for groups that reach from low ≤ 0 to high ≥ 0, shrunk to `ratio` of that, each (O, G, 1).

        Args:
            dtype: the checkpoint's, in which some grids store scales.
            both_zeros: of a whole zero between two codes, return both, not the nearer one only.
        """

    @abstractmethod
    def ship(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Pair:
        """Return the nearest pair that can be stored, fp32; of one that can be, itself."""

    def neighbours(self, scale: Tensor, zero: Tensor) -> list[Pair]:
        """Return pairs beside one that `ship` has returned, any of which a group may take instead; of most grids none.

        Scales that are stored together under one factor are rounded coarsely by `ship`, which sees no weights.
        """
        return []

    @abstractmethod
    def scaled(
        self, scale: Tensor, zero: Tensor, dtype: torch.dtype, factor: Tensor, shift: Tensor | None = None
    ) -> Pair:
        """Return the pair with its scale multiplied by `factor` and its zero shifted by `shift` levels, as it ships.

        Straight through what rounds it, as is `stretched`.
        """

    @abstractmethod
    def stretched(self, scale: Tensor, zero: Tensor, dtype: torch.dtype, low: Tensor | None, high: Tensor) -> Pair:
        """Return the pair with the least and the largest weight of each group multiplied by `low` and `high`.

        A symmetric grid has no `low`: its scale is multiplied by `high`.
        """
