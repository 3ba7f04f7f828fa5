"""Learned step size: a quantizer of one's own."""

import math

import torch
from torch import nn

from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer


@QUANTIZERS.register
class StepSize(LearnedQuantizer):
    """Only the scale of each group is learned; weights round to nearest on it."""

    paper = "LSQ (arXiv 1902.08153), section 2.1"

    def __init__(self, latent, start, *, largest: float = 2.0):
        super().__init__(latent, start)
        self.largest = largest
        self.log_scale = nn.Parameter(torch.zeros_like(self.start_scale))

    def grid(self):
        most = math.log(self.largest)
        return self.scaled_grid(self.log_scale.clamp(-most, most))

    def levels(self, scale):
        return self.latent / scale
