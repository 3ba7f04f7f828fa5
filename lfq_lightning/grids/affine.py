"""Affine: levels above a minimum, scale and minimum in the checkpoint's dtype, as MLX has them."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.above_minimum import AboveMinimum
from lfq_lightning.grids.floats import Floats
from lfq_lightning.grids.grid import Pair
from lfq_lightning.grids.named_grid import Layout, NamedGrid
from lfq_lightning.grids.scale_codec import ScaleCodec
from lfq_lightning.ops.bitstream import pack, unpack

_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@final
@GRIDS.register
@dataclass(frozen=True, kw_only=True)
class Affine(NamedGrid):
    """2 to 8 bits, a scale and a minimum in the model's dtype for 32, 64 or 128 weights.

    Args:
        bits: width of a code: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128.
    """

    bits: int = 4
    group_size: int = 64

    paper = "MLX, mx.quantize, mode affine"
    format = "mlx"
    scales = Floats(least=1e-30, dtype=torch.bfloat16)
    minima = Floats(least=0, dtype=torch.bfloat16)

    def __post_init__(self) -> None:
        if self.bits not in _BITS or self.group_size not in _GROUPS:
            raise UserError(f"grid affine: bits is one of {_BITS} and group_size one of {_GROUPS}, as in MLX.")

    def __str__(self) -> str:
        return f"affine, {self.bits} bits in groups of {self.group_size}"

    @property
    def num_bits(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def levels(self) -> AboveMinimum:  # type: ignore[override]
        return AboveMinimum(2**self.bits - 1)

    def others(self) -> list[dict[str, Any]]:
        return [{"name": "affine", "bits": bits, "group_size": self.group_size} for bits in _BITS]

    def codecs(self, dtype: torch.dtype) -> tuple[ScaleCodec, ScaleCodec | None]:
        return Floats(2.0**-24 if dtype == torch.float16 else 1e-30, dtype), Floats(0, dtype)

    def stored(self, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Pair:
        return scale.to(dtype), zero.to(dtype)

    def layout(self, shape: tuple[int, int]) -> Layout:
        (o, i), groups = shape, shape[1] // self.group_size
        return {
            "weight": (torch.uint32, (o, i * self.bits // 32)),
            "scales": (None, (o, groups)),
            "biases": (None, (o, groups)),
        }

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return {
            "weight": pack(codes, self.bits).view(torch.uint32),
            "scales": scale[..., 0].contiguous(),
            "biases": -zero[..., 0],
        }

    def unpack(self, tensors: dict[str, Tensor]) -> tuple[NamedGrid, Tensor, Tensor, Tensor]:
        scale, minimum = tensors["scales"][..., None], -tensors["biases"][..., None]
        codes = unpack(tensors["weight"].view(torch.int32), self.bits, scale.shape[1] * self.group_size)
        return self, codes, scale.contiguous(), minimum
