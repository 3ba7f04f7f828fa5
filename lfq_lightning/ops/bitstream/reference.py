"""Packing and unpacking of bitstreams in plain PyTorch (any device)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 32
_POSITIVE = 2**63 - 1
# Eight codes lie in the eight bytes of an int64. Each round closes the gaps between lanes of `width` bytes, of
# which the mask shows the lower ones; after three rounds the codes are the low 8·num_bits bits.
_ROUNDS = ((1, 0x00FF00FF00FF00FF), (2, 0x0000FFFF0000FFFF), (4, 0x00000000FFFFFFFF))


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes uint8 (R, C), each below 2^num_bits, along the columns: int32 (R, ceil(C·num_bits / 32)).

    Value i of a row stands at bits i·num_bits …; 32 values fill num_bits words exactly, values may straddle two words.
    """
    rows, columns = codes.shape
    values = F.pad(codes, (0, -columns % _WORD)).flatten()
    if num_bits < 8:
        lanes = values.view(torch.int64)
        for width, low in _ROUNDS:
            high = (lanes & (low << 8 * width & _POSITIVE)).bitwise_right_shift_(width * (8 - num_bits))
            lanes = (lanes & low).bitwise_or_(high)
        values = lanes.view(torch.uint8).view(-1, 8)[:, :num_bits].flatten()
    return values.view(torch.int32).view(rows, -1)[:, : -(-columns * num_bits // _WORD)].contiguous()


def unpack(words: Tensor, num_bits: int, columns: int) -> Tensor:
    """Invert `pack`: int32 (R, W) → uint8 (R, columns)."""
    rows, whole = len(words), -(-columns // _WORD) * num_bits
    values = F.pad(words, (0, whole - words.shape[1])).flatten().view(torch.uint8)
    if num_bits < 8:
        lanes = F.pad(values.view(-1, num_bits), (0, 8 - num_bits)).view(torch.int64)[:, 0]
        for width, _ in reversed(_ROUNDS):
            gap, used = width * (8 - num_bits), _lanes(width, num_bits)
            lanes = (lanes & used).bitwise_or_((lanes & (used << width * num_bits)).bitwise_left_shift_(gap))
        values = lanes.view(torch.uint8)
    return values.view(rows, -1)[:, :columns].contiguous()


def _lanes(width: int, num_bits: int) -> int:
    """Return the mask of the lower `width` codes of each pair of packed lanes, pairs being 2·width bytes apart."""
    return sum((1 << width * num_bits) - 1 << start for start in range(0, 64, 16 * width))
