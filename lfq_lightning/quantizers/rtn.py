"""Round to nearest."""

from typing import Any

import torch
from torch import Tensor

from lfq_lightning.grids import Grid
from lfq_lightning.grids.search_scale import search_scale
from lfq_lightning.quantizers import QUANTIZERS, NearestQuantizer


@QUANTIZERS.register
class RTN(NearestQuantizer):
    """Round to nearest, with the scale of each group searched for the least squared error of the weight.

    Args:
        ratios: shrink factors tried per group; 1 is plain min-max.
    """

    paper = "the baseline of every PTQ paper; e.g. GPTQ (arXiv 2210.17323), section 4"

    def __init__(self, weight: Tensor, scheme: Grid, scale_dtype: torch.dtype, *, ratios: int = 20) -> None:
        super().__init__(weight, scheme, scale_dtype)
        self.ratios = ratios

    @classmethod
    def check(cls, scheme: Grid, options: dict[str, Any]) -> None:
        cls.check_counts(options, "ratios")

    def solve(self) -> None:
        self.scale, self.zero_point = search_scale(self.weight, self.scheme, self.scale_dtype, self.ratios)
