"""IntegerGrid: whole numbers under a scale in the checkpoint's dtype, with a zero point of as many bits as a code."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.grids.grid import Grid, Pair
from lfq_lightning.grids.integers import Integers
from lfq_lightning.ops.learned_grid import round_through, ship_through


@final
@dataclass(frozen=True)
class IntegerGrid(Grid):
    """(code - zero) · scale, both of any group.

    Args:
        num_bits: width of a code, 2 … 8.
        group_size: inputs that share one scale; -1 is all of them (per output channel).
        symmetric: the zero point is fixed to 2^(num_bits-1), so that code 0 is the most negative value.
    """

    num_bits: int = 4
    group_size: int = -1
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise UserError(f"bits: {self.num_bits} is outside 2 … 8.")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(f"group_size: {self.group_size} must be a positive number, or -1 for per output channel.")

    def __str__(self) -> str:
        groups = "per output channel" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.num_bits} bits, {groups}, {'symmetric' if self.symmetric else 'asymmetric'}"

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.group_size

    @property
    def levels(self) -> Integers:  # type: ignore[override]
        return Integers(2**self.num_bits - 1)

    @property
    def middle_code(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.num_bits - 1)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        extra = scale_bits + (0 if self.symmetric else self.num_bits)
        return self.num_bits + extra / self.group_of(in_features)

    def stored(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Pair:
        return scale.to(dtype), zero.to(torch.uint8)

    def candidates(self, low: Tensor, high: Tensor, dtype: torch.dtype, ratio: float, both_zeros: bool) -> list[Pair]:
        """A symmetric grid has one more negative level than positive ones, so both signs of the scale are tried."""
        if self.symmetric:
            largest = torch.maximum(-low, high)
            zero = torch.full_like(low, float(self.middle_code))
            scale = _shippable(largest * (ratio / self.levels.reach), dtype)
            return [(scale, zero), (-scale, zero)]
        scale = _shippable((high - low) * (ratio / self.max_code), dtype)
        exact = -low * ratio / scale
        zeros = [exact.floor(), exact.ceil()] if both_zeros else [exact.round()]
        return [(scale, zero.clamp(0, self.max_code)) for zero in zeros]

    def ship(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Pair:
        return scale.to(dtype).float(), zero.round().clamp(0, self.max_code)

    def scaled(
        self, scale: Tensor, zero: Tensor, dtype: torch.dtype, factor: Tensor, shift: Tensor | None = None
    ) -> Pair:
        shipped = ship_through(scale * factor, dtype)
        if shift is None:
            return shipped, zero
        return shipped, round_through(zero + shift).clamp(0, self.max_code)

    def stretched(self, scale: Tensor, zero: Tensor, dtype: torch.dtype, low: Tensor | None, high: Tensor) -> Pair:
        if low is None:
            return ship_through(scale * high, dtype), zero
        most = self.max_code
        factor = (zero * low + (most - zero) * high) / most
        return ship_through(scale * factor, dtype), round_through(zero * low / factor).clamp(0, most)


def _shippable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the dtype that ships; a group of zeros gets scale 1."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))
