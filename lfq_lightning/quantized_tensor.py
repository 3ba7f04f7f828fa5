"""QuantizedTensor: exactly what ships; the one currency between quantizers, packers and kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lfq_lightning.quant_scheme import QuantScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes of one weight with their scales.

    Args:
        codes: uint8 (O, I), each in 0 … 2^bits-1.
        scale: (O, G, 1) in the dtype that ships (the checkpoint's); may be negative.
        zero_point: uint8 (O, G, 1); the constant 2^(bits-1) if the scheme is symmetric.
        scheme: the grid, with I = G·K.

    Raises ValueError for other dtypes or shapes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: QuantScheme

    def __post_init__(self) -> None:
        o, i = self.codes.shape
        if self.codes.dtype != torch.uint8 or self.zero_point.dtype != torch.uint8:
            raise ValueError(
                f"codes and zero point are {self.codes.dtype} and {self.zero_point.dtype}, but must be uint8"
            )
        expected = (o, i // self.scheme.group_of(i), 1)
        if self.scale.shape != expected or self.zero_point.shape != expected:
            found = f"{tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            raise ValueError(f"scale and zero point are {found}, but must be {expected}")

    def dequantize(self) -> Tensor:
        """Return the weight (O, I) in the scale's dtype: (codes - zero_point) · scale, rounded once.

        Bit-equal to what compressed-tensors computes: the integer difference is exact, only the product rounds.
        """
        return self.exact().to(self.scale.dtype)

    def exact(self) -> Tensor:
        """Return the weight (O, I) fp32, not rounded to the scale's dtype: its rounding to the grid gives the codes."""
        steps = self.codes.view(len(self.codes), self.scale.shape[1], -1).float() - self.zero_point.float()
        return (steps * self.scale.float()).view(self.codes.shape)

    def to(self, device: str | torch.device) -> "QuantizedTensor":
        """Return the same on `device`."""
        return QuantizedTensor(self.codes.to(device), self.scale.to(device), self.zero_point.to(device), self.scheme)

    def split(self, rows: list[int]) -> list["QuantizedTensor"]:
        """Cut the output rows into consecutive parts (the matrices that were solved together)."""
        parts = zip(self.codes.split(rows), self.scale.split(rows), self.zero_point.split(rows), strict=True)
        return [QuantizedTensor(*part, self.scheme) for part in parts]
