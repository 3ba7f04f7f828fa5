"""FlexRound: learned rounding by element-wise division."""

from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.errors import UserError
from lfq_lightning.grids import Grid
from lfq_lightning.ops.fake_quant import LevelTerms
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer


@QUANTIZERS.register
class FlexRound(LearnedQuantizer):
    """FlexRound: Ŵ = s1·(clip(round(W / (s1 ⊙ S2 ⊙ s3)) + z) - z), per channel or group-wise.

    S2 (O, G, K) and s3 (O, 1, 1) are learned in log form from 1, s1 (O, G, 1) as a log factor on the start's scale; so
    training starts exactly at the codes of `init`. s1 is rounded to the dtype that ships inside the graph. With
    `init: gptq`, W is the error-compensated weight that GPTQ rounds. A clipped weight passes no gradient to S2 and s3.

    A division moves large weights far and never lifts a weight that rounds to 0, or changes its sign. An additive
    offset inside the round (AutoRound's, arXiv 2309.05516, section 3) has the opposite property; `offset` learns both.

    Args:
        offset: also learn an offset in [-0.5, 0.5] of a level for each weight.
        zero_point: also learn the zero point of an asymmetric grid.
        rank: learn log S2 as a product L·U of this rank, with a row and a column vector (LRQ, arXiv 2407.11534, section
            3); 0 is a full S2.
    """

    paper = "FlexRound (arXiv 2306.00317), section 3"

    def __init__(
        self, latent: Tensor, start: QuantizedTensor, *, offset: bool = False, zero_point: bool = False, rank: int = 0
    ) -> None:
        super().__init__(latent, start)
        o, i = latent.shape
        self.log_s1 = nn.Parameter(torch.zeros_like(self.start_scale))
        self.log_s3 = nn.Parameter(torch.zeros_like(self.start_scale[:, :1]))
        self.log_s2 = None if rank else nn.Parameter(torch.zeros_like(self.latent))
        self.left = self.right = self.column = None
        if rank:
            rank = min(rank, o, i)
            seed = torch.Generator().manual_seed(o * i)  # U is random, L is 0: LU starts at 0 and has a gradient
            self.left = nn.Parameter(latent.new_zeros(o, rank))
            self.right = nn.Parameter((torch.randn(rank, i, generator=seed) / rank**0.5).to(latent))
            self.column = nn.Parameter(latent.new_zeros(i))
        self.offset = nn.Parameter(torch.zeros_like(self.latent)) if offset else None
        learns_zero = zero_point and not self.scheme.symmetric
        self.zero_shift = nn.Parameter(torch.zeros_like(self.start_scale)) if learns_zero else None

    @classmethod
    def check(cls, scheme: Grid, options: dict[str, Any]) -> None:
        if options["rank"] < 0:
            raise UserError(f"quantizer flexround: rank {options['rank']} must be positive, or 0 for a full S2.")

    def anneal(self, progress: float) -> None:
        if self.offset is not None:
            self.back_into(self.offset, -0.5, 0.5)

    def grid(self) -> tuple[Tensor, Tensor]:
        return self.scaled_grid(self.log_s1, self.zero_shift)

    def levels(self, scale: Tensor) -> LevelTerms:
        return LevelTerms(self.latent, self._log_s2(), self.log_s3, self.offset)

    def _log_s2(self) -> Tensor:
        if self.log_s2 is not None:
            return self.log_s2
        assert self.left is not None and self.right is not None and self.column is not None
        with torch.autocast(self.left.device.type, enabled=False):
            return torch.addmm(self.column, self.left, self.right).view_as(self.latent)
