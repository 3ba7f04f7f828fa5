"""Q4_1: 16 levels above a minimum."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.above_minimum import AboveMinimum
from lfq_lightning.grids.floats import Floats
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, from_nibbles, half_bytes, nibbles


@final
@GRIDS.register
@dataclass(frozen=True)
class Q4_1(GgmlGrid):  # noqa: N801
    """4 bits, a scale and a minimum in fp16 for 32 weights: 5 bits a weight."""

    paper = "ggml-common.h, block_q4_1"
    num_bits = 4
    group_size = 32
    block_bytes = 20
    levels = AboveMinimum(15)
    scales = Floats()
    minima = Floats(least=0)

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.cat([half_bytes(scale), half_bytes(-zero), nibbles(codes)], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = from_nibbles(blocks[..., 4:])
        return codes, from_half_bytes(blocks[..., :2]), -from_half_bytes(blocks[..., 2:4])
