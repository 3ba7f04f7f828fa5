"""AdaRound: soft rounding that hardens while it is trained."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lfq_lightning.errors import UserError
from lfq_lightning.grids import Grid
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer

_EDGE = 0.02  # positions start this far from a level at least, where the sigmoid still has a slope


@QUANTIZERS.register
class AdaRound(LearnedQuantizer):
    """Each weight goes up or down: floor(W/s) + sigmoid(β·ν), with ν learned and β growing until the sigmoid is a step.

    In training the rounding is soft and its gradient exact, no straight-through estimate: the weights that have
    hardened are made up for by those that have not yet (as in TesseraQ, arXiv 2410.19103, which hardens them one share
    after the other). β grows exponentially over the plan's steps in place of AdaRound's regulariser. Held-out checks
    and the export take the hard rounding, ν > 0; at the start that is `init`'s. The scale of each group is learned too.

    Args:
        sharpness: what β grows to, from 1 at the first step.
    """

    paper = "AdaRound (arXiv 2004.10568), section 3.2, equations 21 to 23"
    default_init = "awq"
    learns_positions = True
    rates: ClassVar = {"position": 25.0, "log_scale": 4.0}

    def __init__(self, latent: Tensor, start: QuantizedTensor, *, sharpness: float = 1000.0) -> None:
        super().__init__(latent, start)
        self.sharpness = sharpness
        self.beta = 1.0
        low, gap, between, nearest_up = self.scheme.levels.bracket(self.latent, self.start_scale, self.start_zero)
        position = between.clamp(_EDGE, 1 - _EDGE).logit()
        # a half may round either way: the sign is that of the rounding
        position = torch.where(nearest_up, position.abs().clamp(min=1e-6), -position.abs())
        self.low = nn.Parameter(low, requires_grad=False)
        self.gap = None if gap is None else nn.Parameter(gap, requires_grad=False)
        self.position = nn.Parameter(position)
        self.log_scale = nn.Parameter(torch.zeros_like(self.start_scale))
        del self.latent  # low and position say the same

    @classmethod
    def check(cls, scheme: Grid, options: dict[str, Any]) -> None:
        if not options["sharpness"] > 1:
            raise UserError(f"quantizer adaround: sharpness {options['sharpness']} must be above 1.")

    def anneal(self, progress: float) -> None:
        self.beta = self.sharpness**progress

    def grid(self) -> tuple[Tensor, Tensor]:
        return self.scaled_grid(self.log_scale)

    def levels(self, scale: Tensor) -> Tensor:
        up = (self.position > 0).float()
        level = self.low + (up if self.gap is None else up * self.gap)
        return self.scheme.levels.from_zero(level, *self.grid())

    def forward(self) -> Tensor:
        if not self.training:
            return super().forward()
        scale, zero = self.grid()
        soft = self.scheme.levels.soft_round(self.position, scale, zero, self.low, self.gap, self.beta)
        return soft.flatten(1)
