"""The packed product by dequantisation, a few output rows at a time; any width, group and dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lfq_lightning.bitstream import unpack

TILE_WEIGHTS = 1 << 21  # dequantised at a time: a tile and its integers stay in the cache


def packed_matmul(x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """Return x Ŵᵀ, (M, O) in the dtype of x, with Ŵ = (codes - zero_point) · scale rounded to that dtype.

    Args:
        x: (M, I).
        words: int32 (O, ceil(I·num_bits / 32)), codes packed along the inputs.
        scale: (O, G, 1) in the dtype of x.
        zero_point: uint8 (O, G, 1).
        num_bits: width of a code.
    """
    rows = max(1, TILE_WEIGHTS // x.shape[1])
    parts = zip(words.split(rows), scale.split(rows), zero_point.split(rows), strict=True)
    return torch.cat([F.linear(x, _dequantize(*part, num_bits, x.shape[1])) for part in parts], -1)


def _dequantize(words: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, width: int) -> Tensor:
    codes = unpack(words, num_bits, width).view(*scale.shape[:2], -1)
    return ((codes.float() - zero_point.float()) * scale.float()).to(scale.dtype).flatten(1)
