"""The packed product by dequantisation, a few output rows at a time; any width, group and dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lfq_lightning.grids import Grid
from lfq_lightning.ops.bitstream import unpack
from lfq_lightning.quantized_tensor import QuantizedTensor

TILE_WEIGHTS = 2**21  # dequantised at a time: a tile and its integers stay in the cache
TILE_WEIGHTS_ON_GPU = 2**26  # there launches must be few


def packed_matmul(x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor, scheme: Grid) -> Tensor:
    """Return x Ŵᵀ, (M, O) in the dtype of x, with Ŵ = (codes - zero_point) · scale rounded to the dtype of the scales.

    Args:
        x: (M, I).
        words: int32 (O, ceil(I·num_bits / 32)), codes packed along the inputs.
        scale: (O, G, 1) in any dtype.
        zero_point: uint8 (O, G, 1).
        scheme: the grid.
    """
    rows = max(1, (TILE_WEIGHTS_ON_GPU if x.is_cuda else TILE_WEIGHTS) // x.shape[1])
    parts = zip(words.split(rows), scale.split(rows), zero_point.split(rows), strict=True)
    weights = (QuantizedTensor(unpack(w, scheme.num_bits, x.shape[1]), s, z, scheme).dequantize() for w, s, z in parts)
    return torch.cat([F.linear(x, weight.to(x.dtype)) for weight in weights], -1)
