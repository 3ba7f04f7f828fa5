"""Dense little-endian bitstreams: small integers in 32-bit words, as GPTQ and compressed-tensors store them."""

from torch import Tensor

from lfq_lightning.ops.bitstream import reference
from lfq_lightning.ops.path import runs_triton

__all__ = ["pack", "unpack"]


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes uint8 (R, C), each below 2^num_bits, along the columns: int32 (R, ceil(C·num_bits / 32)).

    Value i of a row stands at bits i·num_bits …; 32 values fill num_bits words exactly, values may straddle two words.
    """
    if runs_triton(codes.device):
        from lfq_lightning.ops.bitstream import triton

        return triton.pack(codes, num_bits)
    return reference.pack(codes, num_bits)


def unpack(words: Tensor, num_bits: int, columns: int) -> Tensor:
    """Invert `pack`: int32 (R, W) → uint8 (R, columns)."""
    if runs_triton(words.device):
        from lfq_lightning.ops.bitstream import triton

        return triton.unpack(words, num_bits, columns)
    return reference.unpack(words, num_bits, columns)
