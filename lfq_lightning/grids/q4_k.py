"""Q4_K: 16 levels above a minimum."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.above_minimum import AboveMinimum
from lfq_lightning.grids.ggml_grid import GgmlGrid, from_half_bytes, from_nibbles, half_bytes, nibbles
from lfq_lightning.grids.six_bits import join_six_bits, split_six_bits
from lfq_lightning.grids.two_levels import SUPER_BLOCK, TwoLevels

SCALES, MINIMA = TwoLevels(6, 32, signed=False), TwoLevels(6, 32, signed=False, least=0)


@final
@GRIDS.register
@dataclass(frozen=True)
class Q4_K(GgmlGrid):  # noqa: N801
    """4 bits, a scale and a minimum of 6 bits for 32 weights under two in fp16 for 256: 4.5 bits a weight."""

    paper = "ggml-common.h, block_q4_K"
    num_bits = 4
    group_size = 32
    unit = SUPER_BLOCK
    block_bytes = 144
    levels = AboveMinimum(15)
    scales = SCALES
    minima = MINIMA

    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return torch.cat([pair_bytes(scale, zero), nibbles(codes.unflatten(-1, (4, 64)), 32).flatten(-2)], -1)

    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pair, codes = blocks.split([16, 128], -1)
        return from_nibbles(codes.unflatten(-1, (4, 32))).flatten(-2), *pair_from_bytes(pair)


def pair_bytes(scale: Tensor, zero: Tensor) -> Tensor:
    """Return scales and minima (O, G, 1) as they begin a block: (O, B, 16)."""
    (whole, sub), (whole_minimum, sub_minimum) = SCALES.parts(scale), MINIMA.parts(zero)
    return torch.cat([half_bytes(whole), half_bytes(whole_minimum), join_six_bits(sub, sub_minimum)], -1)


def pair_from_bytes(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `pair_bytes`."""
    whole, whole_minimum, subs = stored.split([2, 2, 12], -1)
    sub, sub_minimum = split_six_bits(subs)
    scale, minimum = from_half_bytes(whole) * sub, from_half_bytes(whole_minimum) * sub_minimum
    return scale.reshape(len(stored), -1, 1), minimum.reshape(len(stored), -1, 1)
