"""Block-AP: EfficientQAT's first stage, block-wise training of all parameters."""

import torch
from torch import Tensor, nn

from lfq_lightning.ops.fake_quant import LevelTerms
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer


@QUANTIZERS.register
class BlockAP(LearnedQuantizer):
    """Trains the weights themselves, the scales and the zero points, straight through the rounding.

    So that one learning rate serves every model, weights are learned as a shift in levels of the start's scale (W = W₀
    + s₀·ω) and scales as a factor on the start's. A symmetric grid keeps its zero point.
    """

    paper = "EfficientQAT (arXiv 2407.11062), section 3.2, Block-AP"

    def __init__(self, latent: Tensor, start: QuantizedTensor) -> None:
        super().__init__(latent, start)
        self.shift = nn.Parameter(torch.zeros_like(self.latent))
        self.log_scale = nn.Parameter(torch.zeros_like(self.start_scale))
        self.zero_shift = None if self.scheme.symmetric else nn.Parameter(torch.zeros_like(self.start_scale))

    def grid(self) -> tuple[Tensor, Tensor]:
        return self.scaled_grid(self.log_scale, self.zero_shift)

    def levels(self, scale: Tensor) -> LevelTerms:
        return LevelTerms(self.latent, shift=self.shift, unit=self.start_scale)
