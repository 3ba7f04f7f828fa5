"""Q5_K: 32 levels above a minimum."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.above_minimum import AboveMinimum
from lfq_lightning.grids.ggml_grid import GgmlGrid, bits_to_bytes, bytes_to_bits, from_nibbles, nibbles
from lfq_lightning.grids.q4_k import MINIMA, SCALES, pair_bytes, pair_from_bytes
from lfq_lightning.grids.two_levels import SUPER_BLOCK


@final
@GRIDS.register
@dataclass(frozen=True)
class Q5_K(GgmlGrid):  # noqa: N801
    """5 bits, a scale and a minimum of 6 bits for 32 weights under two in fp16 for 256: 5.5 bits a weight."""

    paper = "ggml-common.h, block_q5_K"
    num_bits = 5
    group_size = 32
    unit = SUPER_BLOCK
    block_bytes = 176
    levels = AboveMinimum(31)
    scales = SCALES
    minima = MINIMA

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        fifth = (codes >> 4).unflatten(-1, (8, 32)).transpose(-1, -2)
        low = nibbles((codes & 15).unflatten(-1, (4, 64)), 32).flatten(-2)
        return torch.cat([pair_bytes(scale, zero), bits_to_bytes(fifth), low], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pair, fifth, low = blocks.split([16, 32, 128], -1)
        top = bytes_to_bits(fifth).transpose(-1, -2).flatten(-2)
        return from_nibbles(low.unflatten(-1, (4, 32))).flatten(-2) | top << 4, *pair_from_bytes(pair)
