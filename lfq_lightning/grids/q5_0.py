"""Q5_0: 32 levels around 0."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.fifth_bit import join_fifth_bit, split_fifth_bit
from lfq_lightning.grids.floats import Floats
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, half_bytes
from lfq_lightning.grids.integers import Integers


@final
@GRIDS.register
@dataclass(frozen=True)
class Q5_0(GgmlGrid):  # noqa: N801
    """5 bits, symmetric, a scale in fp16 for 32 weights: 5.5 bits a weight."""

    paper = "ggml-common.h, block_q5_0"
    num_bits = 5
    group_size = 32
    block_bytes = 22
    levels = Integers(31)
    scales = Floats()
    zero = 16.0

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.cat([half_bytes(scale), split_fifth_bit(codes)], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = from_half_bytes(blocks[..., :2])
        return join_fifth_bit(blocks[..., 2:]), scale, torch.full_like(scale, self.zero)
