"""GgmlGrid: a grid of llama.cpp's, stored as the blocks of bytes that a GGUF file holds."""

from abc import abstractmethod

import torch
from torch import Tensor

from lfq_lightning.grids.named_grid import Layout, NamedGrid

BLOCKS = "weight_blocks"


class GgmlGrid(NamedGrid):
    """Base of the types of `ggml-common.h`; the name of a file, in capitals, is that of its type.

    Attributes:
        unit: weights per block.
        block_bytes: bytes per block.
    """

    format = "ggml"
    block_bytes: int

    @abstractmethod
    def blocks(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the bytes uint8 (O, B, block_bytes) of codes uint8 (O, B, unit) and a pair that ships (O, G, 1)."""

    @abstractmethod
    def unblock(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Invert `blocks`: return codes uint8 (O, B, unit), and scale and zero fp32, one for each group (O, G, 1)."""

    def layout(self, shape: tuple[int, int]) -> Layout:
        rows, columns = shape
        return {BLOCKS: (torch.uint8, (rows, columns // self.unit * self.block_bytes))}

    def pack(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return {BLOCKS: self.blocks(codes.view(len(codes), -1, self.unit), scale, zero).flatten(1).contiguous()}

    def unpack(self, tensors: dict[str, Tensor]) -> tuple[NamedGrid, Tensor, Tensor, Tensor]:
        codes, scale, zero = self.unblock(tensors[BLOCKS].unflatten(-1, (-1, self.block_bytes)))
        return self, codes.flatten(1).contiguous(), scale.contiguous(), zero.contiguous()


def half_bytes(values: Tensor) -> Tensor:
    """Return numbers (…, 1) that fp16 holds as their two bytes (…, 2)."""
    return values.half().contiguous().view(torch.uint8)


def from_half_bytes(stored: Tensor) -> Tensor:
    """Invert `half_bytes`, to fp32."""
    return stored.contiguous().view(torch.float16).float()


def nibbles(codes: Tensor, half: int = 16) -> Tensor:
    """Return codes < 16 (…, 2·half) two to a byte: the first `half` low, the others high, (…, half)."""
    low, high = codes.split(half, -1)
    return low | high << 4


def from_nibbles(stored: Tensor) -> Tensor:
    """Invert `nibbles`."""
    return torch.cat([stored & 15, stored >> 4], -1)


def bits_to_bytes(bits: Tensor) -> Tensor:
    """Return bits 0 or 1 (…, n, 8), the least first, as bytes (…, n)."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def bytes_to_bits(stored: Tensor) -> Tensor:
    """Invert `bits_to_bytes`."""
    return stored[..., None] >> torch.arange(8, dtype=torch.uint8, device=stored.device) & 1
