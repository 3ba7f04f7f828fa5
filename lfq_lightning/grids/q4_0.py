"""Q4_0: 16 levels around 0."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.floats import Floats
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, from_nibbles, half_bytes, nibbles
from lfq_lightning.grids.integers import Integers


@final
@GRIDS.register
@dataclass(frozen=True)
class Q4_0(GgmlGrid):  # noqa: N801
    """4 bits, symmetric, a scale in fp16 for 32 weights: 4.5 bits a weight."""

    paper = "ggml-common.h, block_q4_0"
    num_bits = 4
    group_size = 32
    block_bytes = 18
    levels = Integers(15)
    scales = Floats()
    zero = 8.0

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.cat([half_bytes(scale), nibbles(codes)], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = from_half_bytes(blocks[..., :2])
        return from_nibbles(blocks[..., 2:]), scale, torch.full_like(scale, self.zero)
