"""SignRound: AutoRound's learned offsets."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lfq_lightning.ops.fake_quant import LevelTerms
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer

_LEAST = 1e-3  # a grid of width 0 has no scale


@QUANTIZERS.register
class SignRound(LearnedQuantizer):
    """An offset V in [-0.5, 0.5] of a level for each weight before it is rounded, and clip factors for each group.

    Trained by the sign of the gradient, 1 / steps a step, with a line to 0 (the plan's defaults for it); so V can reach
    every one of its values, and no learning rate is tuned. The ends of the grid are those of `init`, multiplied by
    factors in [0, 1].
    """

    paper = "SignRound / AutoRound (arXiv 2309.05516), section 3, equations 3 to 5"
    default_init: ClassVar = {"name": "rtn", "ratios": 1}
    default_optimizer = "sign_sgd"
    learns_positions = True

    def __init__(self, latent: Tensor, start: QuantizedTensor) -> None:
        super().__init__(latent, start)
        self.offset = nn.Parameter(torch.zeros_like(self.latent))
        self.high = nn.Parameter(torch.ones_like(self.start_scale))
        self.low = None if self.scheme.symmetric else nn.Parameter(torch.ones_like(self.start_scale))

    def anneal(self, progress: float) -> None:
        self.back_into(self.offset, -0.5, 0.5)
        self.back_into(self.high, _LEAST, 1)
        if self.low is not None:
            self.back_into(self.low, _LEAST, 1)

    def grid(self) -> tuple[Tensor, Tensor]:
        high = self.high.clamp(_LEAST, 1)
        return self.stretched_grid(None if self.low is None else self.low.clamp(_LEAST, 1), high)

    def levels(self, scale: Tensor) -> LevelTerms:
        return LevelTerms(self.latent, offset=self.offset)
