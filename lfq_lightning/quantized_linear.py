"""QuantizedLinear: a linear layer whose weight comes from a learned quantizer."""

import torch.nn.functional as F
from torch import Tensor, nn

from lfq_lightning.quantizers import LearnedQuantizer


class QuantizedLinear(nn.Module):
    """y = x Ŵᵀ + b with the fake-quantised Ŵ of `quantizer`; the bias is frozen."""

    def __init__(self, quantizer: LearnedQuantizer, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return self.quantizer()

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)
