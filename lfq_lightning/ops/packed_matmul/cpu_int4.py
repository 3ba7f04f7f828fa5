"""The packed product by PyTorch's int4 kernel for CPUs, for codes of up to 4 bits, in bf16.

The kernel is private to PyTorch, and so is its layout: tiles of 64 outputs, each (I, 32) bytes, where byte (i, j) holds
the codes of outputs j and 32 + j at input i. `available` compares that with what the PyTorch at hand makes.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lfq_lightning.quantized_tensor import QuantizedTensor

_TILE = 64  # outputs
_GROUPS = (256, 128, 64, 32)  # group sizes the kernel knows; larger ones repeat their scale
_MIDDLE = 8  # the kernel computes (code - 8) · scale + zero
KERNEL_ROWS = 128  # up to so many rows of x the kernel is faster than dequantising (benchmarks/packed_inference.py)
_TILES_AT_ONCE = 16


@dataclass(frozen=True)
class Int4Weight:
    """A weight (O, I) as the kernel reads it; O is padded to whole tiles.

    Args:
        packed: uint8 (tiles · 64, I / 2).
        scale_and_zero: bf16 (I / K, tiles · 64, 2).
        zero_point: uint8 (O, G, 1), exact, for the path that dequantises.
        out_features: O.
    """

    packed: Tensor
    scale_and_zero: Tensor
    zero_point: Tensor
    out_features: int


def fits(quantized: QuantizedTensor) -> bool:
    """Tell whether the kernel can hold this weight, and is there."""
    group = quantized.scheme.group_of(quantized.codes.shape[1])
    return (
        quantized.scheme.num_bits <= 4
        and quantized.scale.dtype == torch.bfloat16
        and quantized.codes.device.type == "cpu"
        and group % _GROUPS[-1] == 0
        and available()
    )


def int4_weight(quantized: QuantizedTensor) -> Int4Weight:
    """Repack a weight that `fits`."""
    o, i = quantized.codes.shape
    group = quantized.scheme.group_of(i)
    size = next(size for size in _GROUPS if group % size == 0)
    extra = -o % _TILE
    scale, zero = (F.pad(v.float()[:, :, 0], (0, 0, 0, extra)) for v in (quantized.scale, quantized.zero_point))
    pair = torch.stack((scale, (_MIDDLE - zero) * scale), -1).bfloat16()  # (O, G, 2)
    repeated = pair.repeat_interleave(group // size, 1).transpose(0, 1).contiguous()
    return Int4Weight(_tiles(F.pad(quantized.codes, (0, 0, 0, extra))), repeated, quantized.zero_point, o)


def int4_matmul(x: Tensor, weight: Int4Weight) -> Tensor:
    """Return x Ŵᵀ, bf16 (M, O), for x bf16 (M, I)."""
    if len(x) <= KERNEL_ROWS:
        size = x.shape[1] // len(weight.scale_and_zero)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), weight.packed, size, weight.scale_and_zero)
        return product[:, : weight.out_features]
    rows = _TILE * _TILES_AT_ONCE
    parts = [F.linear(x, dequantize(weight, start, rows)) for start in range(0, weight.out_features, rows)]
    return torch.cat(parts, -1)


def dequantize(weight: Int4Weight, start: int, rows: int) -> Tensor:
    """Return output rows from `start` (a multiple of 64) on, at most `rows`, of Ŵ: bf16 (rows, I), as it ships."""
    zero = weight.zero_point[start : start + rows]
    tiles = weight.packed[start : start + rows]
    tiles = tiles.view(-1, tiles.shape[1] * 2, _TILE // 2)  # (tiles, I, 32)
    codes = torch.cat((tiles & 15, tiles >> 4), -1).transpose(1, 2).reshape(-1, tiles.shape[1])[: len(zero)]
    scale = weight.scale_and_zero[:, start : start + len(zero), :1].transpose(0, 1)  # (rows, I / K, 1)
    scale = scale[:, :: scale.shape[1] // zero.shape[1]]
    steps = codes.view(*zero.shape[:2], -1).bfloat16() - zero.bfloat16()
    return (steps * scale).flatten(1)  # exact in bf16 before the one rounding


@cache
def available() -> bool:
    """Tell whether this PyTorch has the kernel, with the layout that is assumed here."""
    codes = torch.randint(0, 16, (2 * _TILE, 32), generator=torch.Generator().manual_seed(0))
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (AttributeError, RuntimeError):  # another PyTorch, or a CPU it has no such kernel for
        return False
    return torch.equal(theirs, _tiles(codes.byte()))


def _tiles(codes: Tensor) -> Tensor:
    o, i = codes.shape
    low, high = codes.view(-1, 2, _TILE // 2, i).transpose(2, 3).unbind(1)  # (tiles, I, 32) each
    return (low | high << 4).reshape(o, i // 2).contiguous()
