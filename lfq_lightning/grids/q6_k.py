"""Q6_K: 64 levels around 0."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, from_nibbles, half_bytes, nibbles
from lfq_lightning.grids.integers import Integers
from lfq_lightning.grids.two_bits import join_two_bits, split_two_bits
from lfq_lightning.grids.two_levels import SUPER_BLOCK, TwoLevels

_SCALES = TwoLevels(8, 16, signed=True)


@final
@GRIDS.register
@dataclass(frozen=True)
class Q6_K(GgmlGrid):  # noqa: N801
    """6 bits, symmetric, a scale of 8 bits for 16 weights under one in fp16 for 256: 6.5625 bits a weight."""

    paper = "ggml-common.h, block_q6_K"
    num_bits = 6
    group_size = 16
    unit = SUPER_BLOCK
    block_bytes = 210
    levels = Integers(63)
    scales = _SCALES
    zero = 32.0

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        whole, sub = _SCALES.parts(scale)
        low = nibbles((codes & 15).unflatten(-1, (2, 128)), 64).flatten(-2)
        sub_bytes = sub.to(torch.int8).view(torch.uint8)
        return torch.cat([low, join_two_bits(codes >> 4, 32), sub_bytes, half_bytes(whole)], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high, sub, whole = blocks.split([128, 64, 16, 2], -1)
        codes = from_nibbles(low.unflatten(-1, (2, 64))).flatten(-2) | split_two_bits(high, 32) << 4
        scale = (from_half_bytes(whole) * sub.contiguous().view(torch.int8)).reshape(len(blocks), -1, 1)
        return codes, scale, torch.full_like(scale, self.zero)
