"""TwoLevels: whole numbers of a few bits per group, under one in fp16 for every 256 weights."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lfq_lightning.grids.scale_codec import ScaleCodec

SUPER_BLOCK = 256


@final
@dataclass(frozen=True)
class TwoLevels(ScaleCodec):
    """super · sub, as in llama.cpp's K-quants.

    The largest number of a super-block always takes the largest `sub` there is (the most negative one, if signed), so
    what is stored can be told from the numbers alone.

    Args:
        num_bits: of a sub.
        group_size: weights per sub.
        signed: subs are -2^(num_bits-1) … 2^(num_bits-1)-1, else 0 … 2^num_bits-1.
        least: 1 if no number may be 0.
    """

    num_bits: int
    group_size: int
    signed: bool
    least: int = 1
    alone = False

    @property
    def top(self) -> int:
        """The sub of a super-block's largest number."""
        return -(2 ** (self.num_bits - 1)) if self.signed else 2**self.num_bits - 1

    def ship(self, value: Tensor) -> Tensor:
        whole, sub = self.parts(value)
        return (whole.float() * sub).view_as(value)

    def parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is stored: the super fp16 (O, S, 1) and the subs (O, S, 256 / group_size), whole numbers fp32."""
        blocks = value.reshape(len(value), -1, SUPER_BLOCK // self.group_size)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        # Below this fp16 is so coarse that the largest sub could change when it is asked for again.
        floor = (abs(self.top) + 1) * 2.0**-24
        whole = largest / self.top
        whole = torch.where(whole < 0, whole.clamp(max=-floor), whole.clamp(min=floor)).half()
        sub = (blocks / whole.float()).round_()
        if self.least:
            toward = torch.where((blocks < 0) != (whole < 0), -1.0, 1.0)
            sub = torch.where(sub == 0, toward if self.signed else torch.ones_like(sub), sub)
        low, high = (self.top, -self.top - 1) if self.signed else (self.least, self.top)
        return whole, sub.clamp_(low, high)

    def bits(self, group_size: int) -> float:
        return self.num_bits / group_size + 16 / SUPER_BLOCK

    def neighbours(self, value: Tensor) -> list[Tensor]:
        """Return those one sub below and above, but for the largest of a super-block, which must stay."""
        whole, sub = self.parts(value)
        low, high = (self.top, -self.top - 1) if self.signed else (self.least, self.top)
        found = []
        for step in (-1.0, 1.0):
            moved = (sub + step).clamp_(low, high)
            wrong = (sub == self.top) | (moved == self.top) | (moved.abs() < self.least)
            found.append((whole.float() * torch.where(wrong, sub, moved)).view_as(value))
        return found
