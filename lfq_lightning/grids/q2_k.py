"""Q2_K: four levels above a minimum."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.above_minimum import AboveMinimum
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, half_bytes
from lfq_lightning.grids.two_bits import join_two_bits, split_two_bits
from lfq_lightning.grids.two_levels import SUPER_BLOCK, TwoLevels

_SCALES, _MINIMA = TwoLevels(4, 16, signed=False), TwoLevels(4, 16, signed=False, least=0)


@final
@GRIDS.register
@dataclass(frozen=True)
class Q2_K(GgmlGrid):  # noqa: N801
    """2 bits, a scale and a minimum of 4 bits for 16 weights under two in fp16 for 256: 2.625 bits a weight."""

    paper = "ggml-common.h, block_q2_K"
    num_bits = 2
    group_size = 16
    unit = SUPER_BLOCK
    block_bytes = 84
    levels = AboveMinimum(3)
    scales = _SCALES
    minima = _MINIMA

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        (whole, sub), (whole_minimum, sub_minimum) = _SCALES.parts(scale), _MINIMA.parts(zero)
        both = sub.to(torch.uint8) | sub_minimum.to(torch.uint8) << 4
        return torch.cat([both, join_two_bits(codes, 32), half_bytes(whole), half_bytes(whole_minimum)], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both, codes, whole, whole_minimum = blocks.split([16, 64, 2, 2], -1)
        scale = from_half_bytes(whole) * (both & 15)
        minimum = from_half_bytes(whole_minimum) * (both >> 4)
        return split_two_bits(codes, 32), scale.reshape(len(blocks), -1, 1), minimum.reshape(len(blocks), -1, 1)
