"""The packed product by PyTorch's int4 kernel for CPUs, for codes of any width.

The kernel multiplies bf16 rows by weights (nibble - 8) · scale + zero, summed in fp32. Codes of more than 4 bits are
two nibbles, whose products add up; a scale that bf16 does not hold is the sum of two that it does, likewise.

The kernel is private to PyTorch, and so is its layout, which differs between CPUs: tiles of T outputs, each (I, T / 2)
bytes, where byte (i, j) holds the codes of outputs j and T / 2 + j at input i. `tile_outputs` finds T by comparing with
what the PyTorch at hand makes.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfq_lightning.grids import IntegerGrid
from lfq_lightning.precision import product_dtype
from lfq_lightning.quantized_tensor import QuantizedTensor

_TILES = (64, 32)  # outputs: AVX-512, AVX2
_GROUPS = (256, 128, 64, 32)  # group sizes the kernel knows; larger ones repeat their scale
_MIDDLE = 8  # the kernel takes it off each nibble
_NIBBLE = 16
KERNEL_ROWS = 128  # up to so many rows of x the kernel is faster than dequantising where bf16 products are fast …
KERNEL_ROWS_IN_FP32 = 16  # … and where they are not (benchmarks/packed_inference.py)
_WEIGHTS_AT_ONCE = 2**19  # dequantised: they and what they are made of stay in the cache


def fits(quantized: QuantizedTensor) -> bool:
    """Tell whether the kernel can hold this weight, and is there."""
    group = quantized.scheme.group_of(quantized.codes.shape[1])
    on_cpu = quantized.codes.device.type == "cpu" and isinstance(quantized.scheme, IntegerGrid)
    return on_cpu and group % _GROUPS[-1] == 0 and tile_outputs() is not None


class Int4Weight(nn.Module):
    """A weight (O, I) that `fits`, as the kernel reads it; O is padded to whole tiles. x (M, I) → x Ŵᵀ (M, O).

    A few rows go through the kernel, in bf16; for many the weight is dequantised, exactly, in the dtype of x, or in the
    one that this CPU multiplies fast.

    Attributes:
        planes: uint8 (P, tiles · T, I / 2), the nibbles of the codes, the upper ones first.
        grids: the bits of bf16 (P, S, I / K, tiles · T, 2), scale and zero of each plane, in S terms; as int16, which a
            model that is turned to another dtype keeps.
        scale: (O, G, 1) as it ships.
        zero_point: uint8 (O, G, 1).
    """

    planes: Tensor
    grids: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantized: QuantizedTensor) -> None:
        super().__init__()
        self.scheme = quantized.scheme
        tile = tile_outputs()
        assert tile is not None, "`fits` has been asked"
        self.tile = tile
        o, group = len(quantized.codes), quantized.scheme.group_of(quantized.codes.shape[1])
        self.out_features, extra = o, -o % tile
        codes = F.pad(quantized.codes, (0, 0, 0, extra))
        nibbles = [codes] if self.scheme.num_bits <= 4 else [codes >> 4, codes & _NIBBLE - 1]
        units = [float(_NIBBLE**power) for power in reversed(range(len(nibbles)))]
        scale, zero = (F.pad(v.float()[:, :, 0], (0, 0, 0, extra)) for v in (quantized.scale, quantized.zero_point))
        terms = 1 if torch.equal(scale.bfloat16().float(), scale) else 2
        scales = _in_bf16(scale, terms)
        zeros = _in_bf16((_MIDDLE * sum(units) - zero) * scale, terms * len(units))
        pairs = [
            torch.stack(((scales[term] * unit).bfloat16(), zeros[plane * terms + term].bfloat16()), -1)  # (O, G, 2)
            for plane, unit in enumerate(units)
            for term in range(terms)
        ]
        self.size = next(size for size in _GROUPS if group % size == 0)
        grids = [pair.repeat_interleave(group // self.size, 1).transpose(0, 1) for pair in pairs]
        for name, tensor in (
            ("planes", torch.stack([_tiles(nibble, tile) for nibble in nibbles])),
            ("grids", torch.stack(grids).unflatten(0, (len(units), terms)).view(torch.int16)),
            ("scale", quantized.scale),
            ("zero_point", quantized.zero_point),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = product_dtype(x.dtype, x.device)
        if len(x) <= (KERNEL_ROWS if wide == torch.bfloat16 else KERNEL_ROWS_IN_FP32):
            return self._kernel(x.bfloat16().contiguous())[:, : self.out_features].to(x.dtype)
        rows = max(1, _WEIGHTS_AT_ONCE // (x.shape[1] * self.tile)) * self.tile
        starts = range(0, self.out_features, rows)
        parts = [F.linear(x.to(wide), self.dequantize(start, rows).to(wide)) for start in starts]
        return torch.cat(parts, -1).to(x.dtype)

    def _kernel(self, x: Tensor) -> Tensor:
        """Return x Ŵᵀ, of padded O; of several terms in fp32."""
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        grids = self.grids.view(torch.bfloat16)
        terms = [(plane, grid) for plane, own in zip(self.planes, grids, strict=True) for grid in own]
        if len(terms) == 1:
            return multiply(x, terms[0][0], self.size, terms[0][1])
        return torch.stack([multiply(x, plane, self.size, grid).float() for plane, grid in terms]).sum(0)

    def dequantize(self, start: int, rows: int) -> Tensor:
        """Return output rows from `start` (a multiple of T) on, at most `rows`, of Ŵ, (rows, I), as it ships."""
        zero, scale = (value[start : start + rows] for value in (self.zero_point, self.scale))
        codes = torch.zeros((), dtype=torch.uint8)
        for plane in self.planes[:, start : start + rows]:
            tiles = plane.view(-1, plane.shape[1] * 2, self.tile // 2)  # (tiles, I, T / 2)
            nibbles = torch.cat((tiles & _NIBBLE - 1, tiles >> 4), -1).transpose(1, 2)
            codes = codes * _NIBBLE + nibbles.reshape(-1, tiles.shape[1])[: len(zero)]
        return QuantizedTensor(codes, scale, zero, self.scheme).dequantize()


@cache
def tile_outputs() -> int | None:
    """Return how many outputs a tile of the kernel has on this CPU; None if there is no kernel of a known layout."""
    codes = torch.randint(0, _NIBBLE, (2 * max(_TILES), 32), generator=torch.Generator().manual_seed(0))
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (AttributeError, RuntimeError):  # another PyTorch, or a CPU it has no such kernel for
        return None
    return next((tile for tile in _TILES if torch.equal(theirs, _tiles(codes.byte(), tile))), None)


def _tiles(codes: Tensor, tile: int) -> Tensor:
    o, i = codes.shape
    low, high = codes.view(-1, 2, tile // 2, i).transpose(2, 3).unbind(1)  # (tiles, I, T / 2) each
    return (low | high << 4).reshape(o, i // 2).contiguous()


def _in_bf16(value: Tensor, terms: int) -> list[Tensor]:
    """Return numbers that bf16 holds, whose sum is `value` fp32, as nearly as so many can be."""
    found: list[Tensor] = []
    for _ in range(terms):
        found.append((value - sum(found)).bfloat16().float())
    return found
