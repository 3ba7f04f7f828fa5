"""Q5_1: 32 levels above a minimum."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.above_minimum import AboveMinimum
from lfq_lightning.grids.fifth_bit import join_fifth_bit, split_fifth_bit
from lfq_lightning.grids.floats import Floats
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, half_bytes


@final
@GRIDS.register
@dataclass(frozen=True)
class Q5_1(GgmlGrid):  # noqa: N801
    """5 bits, a scale and a minimum in fp16 for 32 weights: 6 bits a weight."""

    paper = "ggml-common.h, block_q5_1"
    num_bits = 5
    group_size = 32
    block_bytes = 24
    levels = AboveMinimum(31)
    scales = Floats()
    minima = Floats(least=0)

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.cat([half_bytes(scale), half_bytes(-zero), split_fifth_bit(codes)], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = join_fifth_bit(blocks[..., 4:])
        return codes, from_half_bytes(blocks[..., :2]), -from_half_bytes(blocks[..., 2:4])
