"""NVFP4: E2M1 under scales in fp8, in groups of 16."""

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.e2m1 import E2M1, from_bytes, to_bytes
from lfq_lightning.grids.e4m3 import E4M3
from lfq_lightning.grids.named_grid import Layout, NamedGrid


@final
@GRIDS.register
@dataclass(frozen=True)
class NVFP4(NamedGrid):
    """4 bits of floating point, a scale in fp8 for 16 weights under one in fp32 for the matrix: 4.5 bits a weight.

    The number for the matrix is a power of two: fp8 has exponents of its own, so nothing is lost, and products of
    scales are exact. Layers that are solved together, such as q, k and v, have the same, as engines want that fuse
    them.
    """

    unit_scale: float = field(default=2.0**-11, compare=False, repr=False)  # until `fitted` has seen a weight

    paper = "compressed-tensors, nvfp4-pack-quantized; NVIDIA, pretraining with NVFP4 (arXiv 2509.25149), section 2"
    format = "compressed_tensors"
    num_bits = 4
    group_size = 16
    levels = E2M1

    @property
    def scales(self) -> E4M3:  # type: ignore[override]
        return E4M3(self.unit_scale)

    def fitted(self, weight: Tensor) -> "NVFP4":
        return replace(self, unit_scale=E4M3.unit_for(float(weight.abs().max()) / E2M1.reach))

    def layout(self, shape: tuple[int, int]) -> Layout:
        o, i = shape
        return {
            "weight_packed": (torch.uint8, (o, i // 2)),
            "weight_scale": (torch.float8_e4m3fn, (o, i // self.group_size)),
            "weight_global_scale": (torch.float32, (1,)),
        }

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return {
            "weight_packed": to_bytes(codes),
            "weight_scale": self.scales.stored(scale)[..., 0].contiguous(),
            "weight_global_scale": torch.tensor([1 / self.unit_scale], device=codes.device),
        }

    def unpack(self, tensors: dict[str, Tensor]) -> tuple["NVFP4", Tensor, Tensor, Tensor]:
        grid = replace(self, unit_scale=1 / float(tensors["weight_global_scale"]))
        scale = tensors["weight_scale"].float()[..., None] * grid.unit_scale
        return grid, from_bytes(tensors["weight_packed"]), scale, torch.zeros_like(scale)
