"""NamedGrid: a grid that a format defines, whole: its levels, how scales are stored, and in which tensors."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lfq_lightning.grids.grid import Grid, Pair
from lfq_lightning.grids.scale_codec import ScaleCodec
from lfq_lightning.ops.learned_grid import straight_through
from lfq_lightning.registry import plugin_name

Layout = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


class NamedGrid(Grid):
    """Base of registered grids; a constructor without arguments makes one.

    A QuantizedTensor holds its scales and minima in fp32, unless it stores them in the checkpoint's dtype.

    Attributes:
        paper: where the grid is specified.
        format: the name of the PackFormat that holds it.
        scales: how scales are stored.
        minima: how minima are, for levels above a minimum; None for a symmetric grid.
        zero: the zero of a symmetric grid, as its levels have it.
    """

    paper: str
    format: str
    scales: ScaleCodec
    minima: ScaleCodec | None = None
    zero: float = 0.0

    def __str__(self) -> str:
        return plugin_name(type(self))

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.group_size

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.minima is None

    def others(self) -> list[dict[str, Any]]:
        """Return how YAML says this grid with other options, from few bits to many; nothing if it has none."""
        return []

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        dtype = torch.bfloat16 if scale_bits == 16 else torch.float32
        codecs = [codec for codec in self.codecs(dtype) if codec is not None]
        return self.num_bits + sum(codec.bits(self.group_size) for codec in codecs)

    @abstractmethod
    def layout(self, shape: tuple[int, int]) -> Layout:
        """Return the tensors that store a weight (O, I): last part of the name → dtype and shape; the codes first.

        No dtype is that of the checkpoint.
        """

    @abstractmethod
    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """Return the tensors of `layout` for codes uint8 (O, I) and a pair that ships, fp32 (O, G, 1)."""

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor]) -> tuple["NamedGrid", Tensor, Tensor, Tensor]:
        """Invert `pack`: return the grid as `fitted` to this weight, its codes (O, I), scale and zero (O, G, 1)."""

    def codecs(self, dtype: torch.dtype) -> tuple[ScaleCodec, ScaleCodec | None]:
        """Return how scales and minima are stored, for a checkpoint's dtype."""
        return self.scales, self.minima

    def stored(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Pair:
        return scale.float(), zero.float()

    def candidates(self, low: Tensor, high: Tensor, dtype: torch.dtype, ratio: float, both_zeros: bool) -> list[Pair]:
        scales, minima = self.codecs(dtype)
        if minima is None:
            scale, zero = torch.maximum(-low, high) * (ratio / self.levels.reach), torch.full_like(low, self.zero)
            pairs = [(each, zero) for each in ((scale, -scale) if scales.signed else (scale,))]
        else:
            pairs = [((high - low) * (ratio / self.max_code), -low * ratio)]
        return [self.ship(*pair, dtype) for pair in pairs] if scales.alone else pairs

    def ship(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Pair:
        scales, minima = self.codecs(dtype)
        return scales.ship(scale), zero if minima is None else minima.ship(zero)

    def neighbours(self, scale: Tensor, zero: Tensor) -> list[Pair]:
        scales = [scale, *self.scales.neighbours(scale)]
        zeros = [zero] if self.minima is None else [zero, *self.minima.neighbours(zero)]
        return [(s, z) for s in scales for z in zeros][1:]

    def scaled(
        self, scale: Tensor, zero: Tensor, dtype: torch.dtype, factor: Tensor, shift: Tensor | None = None
    ) -> Pair:
        scales, minima = self.codecs(dtype)
        if minima is None:
            return straight_through(scale * factor, scales.ship), zero
        minimum = zero * factor if shift is None else zero * factor + shift * scale
        return straight_through(scale * factor, scales.ship), straight_through(minimum, minima.ship)

    def stretched(self, scale: Tensor, zero: Tensor, dtype: torch.dtype, low: Tensor | None, high: Tensor) -> Pair:
        scales, minima = self.codecs(dtype)
        if minima is None or low is None:
            return straight_through(scale * high, scales.ship), zero
        minimum, most = zero * low, self.max_code
        wide = (minimum + (most * scale - zero) * high) / most
        return straight_through(wide, scales.ship), straight_through(minimum, minima.ship)
