"""GGUF's blocks: llama.cpp's own grids as they are; Q4_0, Q4_1 and Q8_0 where they hold integers exactly."""

import numpy as np
import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.formats.half_scale import half_scale
from lfq_lightning.grids import Grid, NamedGrid
from lfq_lightning.grids.ggml_grid import BLOCKS, GgmlGrid
from lfq_lightning.quantized_tensor import QuantizedTensor

BLOCK = 32


def block_type(name: str, scheme: Grid, in_features: int) -> str:
    """Return the type that holds layer `name`: a group of a multiple of 32 inputs repeats its scale in each block.

    Up to 4 bits are Q4_0 if symmetric and Q4_1 if not, up to 8 symmetric bits are Q8_0. Raises UserError if none does.
    """
    if isinstance(scheme, GgmlGrid):
        return str(scheme).upper()
    if isinstance(scheme, NamedGrid):
        raise UserError(f"{name} is on the grid {scheme}, which GGUF does not hold; quantise with one of llama.cpp's.")
    if scheme.group_of(in_features) % BLOCK:
        raise UserError(
            f"{name} has groups of {scheme.group_of(in_features)} inputs, but GGUF's blocks hold {BLOCK}; quantise "
            f"with a group_size that is a multiple of {BLOCK}, or export to gptq_v2 or compressed-tensors."
        )
    if scheme.num_bits > 4 and not scheme.symmetric:
        raise UserError(
            f"{name} has {scheme.num_bits} asymmetric bits, and GGUF's blocks of more than 4 are symmetric; quantise "
            "with symmetric: true, or export to gptq_v2 or compressed-tensors."
        )
    return "Q8_0" if scheme.num_bits > 4 else "Q4_0" if scheme.symmetric else "Q4_1"


def blocks(name: str, quantized: QuantizedTensor) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """Return the bytes of a weight (O, I) as `block_type` says: uint8 (O, I / 32 · bytes of a block).

    Q4_0 is (q - 8)·d and Q8_0 q·d, exact if fp16 holds the scales; Q4_1 is q·d + m, where m = -z·d is rounded to fp16.
    """
    if isinstance(quantized.scheme, GgmlGrid):
        return quantized.scheme.pack(quantized.codes, quantized.scale, quantized.zero_point)[BLOCKS].numpy()
    o, i = quantized.codes.shape
    kind = block_type(name, quantized.scheme, i)
    repeats = quantized.scheme.group_of(i) // BLOCK
    scale = quantized.scale.repeat_interleave(repeats, 1)  # (O, I / 32, 1)
    zero = quantized.zero_point.repeat_interleave(repeats, 1)
    codes = quantized.codes.view(o, -1, BLOCK)
    parts = [_bytes(half_scale(name, scale))]
    if kind == "Q8_0":
        parts.append((codes.short() - zero.short()).to(torch.int8).view(torch.uint8))
    else:
        if kind == "Q4_1":
            parts.append(_bytes((-zero.float() * scale.float()).half()))
        else:
            codes = codes + 8 - zero
        low, high = codes.split(BLOCK // 2, -1)
        parts.append(low | high << 4)
    return torch.cat(parts, -1).flatten(1).numpy()


def _bytes(half: Tensor) -> Tensor:
    return half.contiguous().view(torch.uint8)
