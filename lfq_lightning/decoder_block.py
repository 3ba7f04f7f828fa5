"""DecoderBlock: one decoder layer of transformers with the arguments it is always called with."""

from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.quantized_linear import QuantizedLinear
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import LearnedQuantizer


class DecoderBlock(nn.Module):
    """Hidden states (B, T, D) → (B, T, D) for any B, at the T the arguments were captured for.

    Args:
        layer: the layer of transformers, frozen, in fp32.
        arguments: its keyword arguments (position embeddings, mask) as captured with one sequence; they broadcast.
            Pads stand on the right, so a causal mask alone keeps them from the real tokens.
    """

    def __init__(self, layer: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self._arguments = arguments

    def linears(self) -> dict[str, nn.Linear]:
        """Return name inside the layer → linear layer, in the order of definition."""
        return {name: module for name, module in self.layer.named_modules() if isinstance(module, nn.Linear)}

    def train_linear(self, name: str, quantizer: LearnedQuantizer) -> None:
        """Let a linear layer take its weight from a learned quantizer from now on."""
        linear = self.linears()[name]
        self.layer.set_submodule(name, QuantizedLinear(quantizer, linear.bias))

    def ship(self) -> dict[str, QuantizedTensor]:
        """Turn trained layers back into linear layers with the weights that ship, and return those by name."""
        trained = {name: m for name, m in self.layer.named_modules() if isinstance(m, QuantizedLinear)}
        shipped = {name: module.quantizer.export() for name, module in trained.items()}
        for name, quantized in shipped.items():
            weight = quantized.dequantize().float()
            bias = trained[name].bias
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                linear.bias = bias
            self.layer.set_submodule(name, linear)
        return shipped

    def forward(self, hidden: Tensor) -> Tensor:
        arguments = {name: _to(value, hidden.device) for name, value in self._arguments.items()}
        output = self.layer(hidden, **arguments)
        assert isinstance(output, Tensor), "decoder layers return a tensor since transformers 5"
        return output


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value
