"""OmniQuant's learned weight clipping."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lfq_lightning.ops.fake_quant import LevelTerms
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer

_START = 4.0  # sigmoid(4) = .982, the paper's first clipping


@QUANTIZERS.register
class OmniQuant(LearnedQuantizer):
    """Learned weight clipping (LWC): the smallest and largest value of each group shrink by learned sigmoids.

    Two numbers per group are learned, β and γ from 4: low = low₀·σ(β)/σ(4), high = high₀·σ(γ)/σ(4); rounding is to
    nearest. low₀ and high₀ are the ends of `init`: plain min-max as in the paper. (The paper starts at σ(4) = .982 of
    them; here training starts exactly at `init`.) A symmetric grid learns γ only.
    """

    paper = "OmniQuant (arXiv 2308.13137), section 3.2, equation 2"
    default_init: ClassVar = {"name": "rtn", "ratios": 1}
    # The paper's 2560 steps of 1e-2 can take a factor from 4 to anywhere; some hundred need ten times that.
    rates: ClassVar = {"gamma": 50.0, "beta": 50.0}

    def __init__(self, latent: Tensor, start: QuantizedTensor) -> None:
        super().__init__(latent, start)
        self.gamma = nn.Parameter(torch.full_like(self.start_scale, _START))
        self.beta = None if self.scheme.symmetric else nn.Parameter(torch.full_like(self.start_scale, _START))

    def grid(self) -> tuple[Tensor, Tensor]:
        full = torch.full_like(self.start_scale, _START).sigmoid()
        high = self.gamma.sigmoid() / full
        return self.stretched_grid(None if self.beta is None else self.beta.sigmoid() / full, high)

    def levels(self, scale: Tensor) -> LevelTerms:
        return LevelTerms(self.latent)
