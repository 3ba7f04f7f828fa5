"""IQ4_NL: 16 levels that lie closer near 0."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.code_book import CodeBook
from lfq_lightning.grids.floats import Floats
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, from_nibbles, half_bytes, nibbles

NON_LINEAR = CodeBook((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


@final
@GRIDS.register
@dataclass(frozen=True)
class IQ4_NL(GgmlGrid):  # noqa: N801
    """4 bits for 16 fixed levels, a scale in fp16 for 32 weights: 4.5 bits a weight."""

    paper = "ggml-common.h, block_iq4_nl and kvalues_iq4nl"
    num_bits = 4
    group_size = 32
    block_bytes = 18
    levels = NON_LINEAR
    scales = Floats()

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.cat([half_bytes(scale), nibbles(codes)], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = from_half_bytes(blocks[..., :2])
        return from_nibbles(blocks[..., 2:]), scale, torch.zeros_like(scale)
