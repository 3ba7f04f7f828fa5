"""QuantizedLinear: a linear layer whose weight comes from a learned quantizer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfq_lightning.quantizers import LearnedQuantizer


class QuantizedLinear(nn.Module):
    """y = x Ŵᵀ + b with the fake-quantised Ŵ of `quantizer`; the bias is frozen.

    Args:
        quantizer: what is trained.
        bias: (O,) or None.
        checkpointing: in training keep only x, and make Ŵ again in the backward pass; it and what its gradient needs
            are several times as large as the weight.
    """

    def __init__(self, quantizer: LearnedQuantizer, bias: nn.Parameter | None, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.quantizer = quantizer
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return self.quantizer()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._product, inputs, use_reentrant=False)
        return self._product(inputs)

    def _product(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)
