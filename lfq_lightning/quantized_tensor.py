"""QuantizedTensor: exactly what ships; the one currency between quantizers, packers and kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lfq_lightning.grids import Grid, IntegerGrid


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes of one weight with what they stand for.

    Args:
        codes: uint8 (O, I), each in 0 … the grid's largest.
        scale: (O, G, 1) in the dtype that ships; of grids that code it, fp32. May be negative.
        zero_point: (O, G, 1); of integers uint8, the constant 2^(bits-1) if symmetric; of named grids in the dtype
            of the scale, what their levels subtract.
        scheme: the grid, with I = G·K.

    Raises ValueError for other dtypes or shapes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: Grid

    def __post_init__(self) -> None:
        o, i = self.codes.shape
        wanted = torch.uint8 if isinstance(self.scheme, IntegerGrid) else self.scale.dtype
        if self.codes.dtype != torch.uint8 or self.zero_point.dtype != wanted:
            found = f"{self.codes.dtype} and {self.zero_point.dtype}"
            raise ValueError(f"codes and zero point are {found}, but must be uint8 and {wanted}")
        expected = (o, i // self.scheme.group_of(i), 1)
        if self.scale.shape != expected or self.zero_point.shape != expected:
            found = f"{tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            raise ValueError(f"scale and zero point are {found}, but must be {expected}")

    def dequantize(self) -> Tensor:
        """Return the weight (O, I) in the scale's dtype; of integers (codes - zero_point) · scale, rounded once.

        Bit-equal to what compressed-tensors computes: the integer difference is exact, only the product rounds.
        """
        return self.exact().to(self.scale.dtype)

    def exact(self) -> Tensor:
        """Return the weight (O, I) fp32, not rounded to the scale's dtype: its rounding to the grid gives the codes."""
        codes = self.codes.view(len(self.codes), self.scale.shape[1], -1).float()
        return self.scheme.levels.value(codes, self.scale.float(), self.zero_point.float()).view(self.codes.shape)

    def to(self, device: str | torch.device) -> "QuantizedTensor":
        """Return the same on `device`."""
        return QuantizedTensor(self.codes.to(device), self.scale.to(device), self.zero_point.to(device), self.scheme)

    def split(self, rows: list[int]) -> list["QuantizedTensor"]:
        """Cut the output rows into consecutive parts (the matrices that were solved together)."""
        parts = zip(self.codes.split(rows), self.scale.split(rows), self.zero_point.split(rows), strict=True)
        return [QuantizedTensor(*part, self.scheme) for part in parts]
