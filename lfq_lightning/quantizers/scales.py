"""Scales: only the grid's scale is learned, the codes stay."""

import torch
from torch import Tensor, nn

from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer


@QUANTIZERS.register
class Scales(LearnedQuantizer):
    """The scale of each group is learned; codes and zero points stay those that training starts from.

    One number per group: few enough that all blocks can be trained at once, through each other (`match: whole`), and
    with an objective on logits through the head, as in the paper. docs/log.md has what it brings.
    """

    paper = "EfficientQAT (arXiv 2407.11062), section 3.3, E2E-QP"

    def __init__(self, latent: Tensor, start: QuantizedTensor) -> None:
        super().__init__(latent, start)
        codes = start.codes.view(self.latent.shape)
        self.level = nn.Parameter(self.scheme.levels.of(codes), requires_grad=False)
        self.log_scale = nn.Parameter(torch.zeros_like(self.start_scale))
        del self.latent  # the level says all that is needed of it

    def grid(self) -> tuple[Tensor, Tensor]:
        return self.scaled_grid(self.log_scale)

    def levels(self, scale: Tensor) -> Tensor:
        return self.scheme.levels.from_zero(self.level, *self.grid())
