"""IQ4_XS: the levels of IQ4_NL under scales in six bits."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, from_nibbles, half_bytes, nibbles
from lfq_lightning.grids.iq4_nl import NON_LINEAR
from lfq_lightning.grids.two_bits import join_two_bits, split_two_bits
from lfq_lightning.grids.two_levels import SUPER_BLOCK, TwoLevels

_SCALES = TwoLevels(6, 32, signed=True)


@final
@GRIDS.register
@dataclass(frozen=True)
class IQ4_XS(GgmlGrid):  # noqa: N801
    """4 bits for 16 fixed levels, a scale of 6 bits for 32 weights under one in fp16 for 256: 4.25 bits a weight."""

    paper = "ggml-common.h, block_iq4_xs"
    num_bits = 4
    group_size = 32
    unit = SUPER_BLOCK
    block_bytes = 136
    levels = NON_LINEAR
    scales = _SCALES

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        whole, sub = _SCALES.parts(scale)
        stored = (sub + 32).to(torch.uint8)
        low = (stored & 15).unflatten(-1, (4, 2))
        parts = [
            half_bytes(whole),
            join_two_bits(stored >> 4, 1),
            low[..., 0] | low[..., 1] << 4,
            nibbles(codes.unflatten(-1, (8, 32))).flatten(-2),
        ]
        return torch.cat(parts, -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole, high, low, codes = blocks.split([2, 2, 4, 128], -1)
        bottom = torch.stack([low & 15, low >> 4], -1).flatten(-2)
        scale = from_half_bytes(whole) * ((bottom | split_two_bits(high, 1) << 4).float() - 32)
        scale = scale.reshape(len(blocks), -1, 1)
        return from_nibbles(codes.unflatten(-1, (8, 16))).flatten(-2), scale, torch.zeros_like(scale)
