"""Q3_K: eight levels around 0."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.ggml_grid import GgmlGrid, bits_to_bytes, bytes_to_bits, from_half_bytes, half_bytes
from lfq_lightning.grids.integers import Integers
from lfq_lightning.grids.two_bits import join_two_bits, split_two_bits
from lfq_lightning.grids.two_levels import SUPER_BLOCK, TwoLevels

_SCALES = TwoLevels(6, 16, signed=True)


@final
@GRIDS.register
@dataclass(frozen=True)
class Q3_K(GgmlGrid):  # noqa: N801
    """3 bits, symmetric, a scale of 6 bits for 16 weights under one in fp16 for 256: 3.4375 bits a weight."""

    paper = "ggml-common.h, block_q3_K"
    num_bits = 3
    group_size = 16
    unit = SUPER_BLOCK
    block_bytes = 110
    levels = Integers(7)
    scales = _SCALES
    zero = 4.0

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        whole, sub = _SCALES.parts(scale)
        stored = (sub + 32).to(torch.uint8)
        low = (stored & 15).unflatten(-1, (2, 8))
        third = (codes >> 2).unflatten(-1, (8, 32)).transpose(-1, -2)
        parts = [
            bits_to_bytes(third),
            join_two_bits(codes & 3, 32),
            low[..., 0, :] | low[..., 1, :] << 4,
            join_two_bits(stored >> 4, 4),
            half_bytes(whole),
        ]
        return torch.cat(parts, -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        third, codes, low, high, whole = blocks.split([32, 64, 8, 4, 2], -1)
        bottom = torch.cat([low & 15, low >> 4], -1)
        scale = from_half_bytes(whole) * ((bottom | split_two_bits(high, 4) << 4).float() - 32)
        scale = scale.reshape(len(blocks), -1, 1)
        top = bytes_to_bits(third).transpose(-1, -2).flatten(-2)
        return split_two_bits(codes, 32) | top << 2, scale, torch.full_like(scale, self.zero)
