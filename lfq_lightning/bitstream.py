"""Dense little-endian bitstreams: small integers in 32-bit words, as GPTQ and compressed-tensors store them."""

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 32


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes uint8 (R, C), each below 2^num_bits, along the columns: int32 (R, ceil(C·num_bits / 32)).

    Value i of a row stands at bits i·num_bits …; 32 values fill num_bits words exactly, values may straddle two words.
    """
    rows, columns = codes.shape
    chunks = -(-columns // _WORD)
    values = F.pad(codes, (0, chunks * _WORD - columns)).view(rows, chunks, _WORD).long()
    words = torch.zeros(rows, chunks, num_bits + 1, dtype=torch.int64, device=codes.device)
    for i in range(_WORD):
        word, shift = divmod(i * num_bits, _WORD)
        shifted = values[..., i] << shift
        words[..., word] |= shifted & 0xFFFFFFFF
        words[..., word + 1] |= shifted >> _WORD
    used = -(-columns * num_bits // _WORD)
    signed = words[..., :num_bits].reshape(rows, -1)[:, :used]
    return torch.where(signed >= 2**31, signed - 2**32, signed).to(torch.int32).contiguous()


def unpack(words: Tensor, num_bits: int, columns: int) -> Tensor:
    """Invert `pack`: int32 (R, W) → uint8 (R, columns)."""
    rows = len(words)
    chunks = -(-columns // _WORD)
    padded = F.pad(words.long() & 0xFFFFFFFF, (0, chunks * num_bits - words.shape[1])).view(rows, chunks, num_bits)
    padded = F.pad(padded, (0, 1))
    codes = torch.empty(rows, chunks, _WORD, dtype=torch.uint8, device=words.device)
    for i in range(_WORD):
        word, shift = divmod(i * num_bits, _WORD)
        both = padded[..., word] >> shift | padded[..., word + 1] << (_WORD - shift)
        codes[..., i] = (both & (2**num_bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns].contiguous()
