"""Q8_0: 256 levels around 0."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.floats import Floats
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, half_bytes
from lfq_lightning.grids.integers import Integers


@final
@GRIDS.register
@dataclass(frozen=True)
class Q8_0(GgmlGrid):  # noqa: N801
    """8 bits, symmetric, a scale in fp16 for 32 weights: 8.5 bits a weight."""

    paper = "ggml-common.h, block_q8_0"
    num_bits = 8
    group_size = 32
    block_bytes = 34
    levels = Integers(255)
    scales = Floats()
    zero = 128.0

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.cat([half_bytes(scale), codes ^ 128], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = from_half_bytes(blocks[..., :2])
        return blocks[..., 2:] ^ 128, scale, torch.full_like(scale, self.zero)
