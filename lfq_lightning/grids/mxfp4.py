"""MXFP4: E2M1 under powers of two, in groups of 32."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.e2m1 import E2M1, from_bytes, to_bytes
from lfq_lightning.grids.e8m0 import BIAS, E8M0
from lfq_lightning.grids.named_grid import Layout, NamedGrid


@final
@GRIDS.register
@dataclass(frozen=True)
class MXFP4(NamedGrid):
    """4 bits of floating point, a power of two for 32 weights: 4.25 bits a weight."""

    paper = "OCP Microscaling formats, version 1.0, section 5.2; compressed-tensors, mxfp4-pack-quantized"
    format = "compressed_tensors"
    num_bits = 4
    group_size = 32
    levels = E2M1
    scales = E8M0()

    def layout(self, shape: tuple[int, int]) -> Layout:
        o, i = shape
        return {
            "weight_packed": (torch.uint8, (o, i // 2)),
            "weight_scale": (torch.uint8, (o, i // self.group_size)),
        }

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": to_bytes(codes), "weight_scale": E8M0().stored(scale)[..., 0].contiguous()}

    def unpack(self, tensors: dict[str, Tensor]) -> tuple["MXFP4", Tensor, Tensor, Tensor]:
        powers = tensors["weight_scale"].int()[..., None] - BIAS
        scale = torch.ldexp(torch.ones(powers.shape, device=powers.device), powers)
        return self, from_bytes(tensors["weight_packed"]), scale, torch.zeros_like(scale)
