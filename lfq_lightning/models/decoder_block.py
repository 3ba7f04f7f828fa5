"""DecoderBlock: one decoder layer of transformers, or a few, with the arguments they are always called with."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lfq_lightning.errors import UserError
from lfq_lightning.models.kept_linear import packable
from lfq_lightning.models.passage import Passage
from lfq_lightning.models.quantized_linear import QuantizedLinear
from lfq_lightning.precision import cast
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import LearnedQuantizer
from lfq_lightning.registry import plugin_name


class DecoderBlock(nn.Module):
    """Hidden states (B, T, D) → (B, T, D) for any B, at the T the arguments were captured for.

    Args:
        names: of the layers in the model (`model.layers.3`).
        layers: of transformers, frozen, in fp32.
        arguments: each layer's keyword arguments (position embeddings, mask) as captured with one sequence; they
            broadcast. Pads stand on the right, so a causal mask alone keeps them from the real tokens.
        activation_checkpointing: in training keep only each layer's input, and run the layer again in the backward;
            there, likewise, each quantised weight is made again only when its gradient is due.
        passage: what travels beside the hidden states, in columns behind D; None if nothing does.
        first: the number of the first layer.
    """

    def __init__(
        self,
        names: list[str],
        layers: list[nn.Module],
        arguments: list[dict[str, Any]],
        activation_checkpointing: bool = False,
        passage: Passage | None = None,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.passage = passage
        self.first = first
        self.activation_checkpointing = activation_checkpointing
        self.names = names
        self.layers = nn.ModuleList(layers)
        self._arguments = arguments
        self._stored = [set(layer.state_dict()) for layer in layers]

    def modules_by_name(self) -> dict[str, nn.Module]:
        """Return full name → module, in the order of definition."""
        return {
            f"{name}.{inner}": module
            for name, layer in zip(self.names, self.layers, strict=True)
            for inner, module in layer.named_modules()
            if inner
        }

    def linears(self) -> dict[str, nn.Linear]:
        """Return full name → linear layer, in the order of definition; those that cannot be packed are none."""
        return {name: m for name, m in self.modules_by_name().items() if packable(m)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the frozen weights, biases and stored buffers by full name; those of trained layers are not there."""
        return {
            f"{name}.{key}": tensor
            for name, layer, stored in zip(self.names, self.layers, self._stored, strict=True)
            # not state_dict: FSDP would shard them again
            for key, tensor in (*layer.named_parameters(), *((n, b) for n, b in layer.named_buffers() if n in stored))
        }

    def load(self, weights: dict[str, Tensor], device: torch.device) -> None:
        """Put weights and biases in place by full name; in fp32, whatever their dtype, on the device."""
        for name, layer in zip(self.names, self.layers, strict=True):
            own = {key: cast(weights[f"{name}.{key}"], torch.float32) for key in layer.state_dict()}
            layer.load_state_dict(own, assign=True)
            layer.to(device).requires_grad_(False)

    def parts(self) -> "list[DecoderBlock]":
        """Return each layer as a block of its own; the modules are the same."""
        return [
            DecoderBlock([name], [layer], [arguments], self.activation_checkpointing, self.passage, first)
            for first, (name, layer, arguments) in enumerate(
                zip(self.names, self.layers, self._arguments, strict=True), self.first
            )
        ]

    def release(self) -> None:
        """Free what the layers hold, also where something else holds the layers."""
        for layer in self.layers:
            for name, _ in list(layer.named_children()):
                delattr(layer, name)

    def train_linear(self, name: str, quantizer: LearnedQuantizer) -> None:
        """Let a linear layer take its weight from a learned quantizer from now on.

        Raises UserError if the quantizer's `grid` has another shape than its start's, or its `forward` gives no finite
        weight of the layer's shape.
        """
        linear, plugin = self.linears()[name], plugin_name(type(quantizer))
        with torch.no_grad():
            expected, grid = tuple(quantizer.start_scale.shape), quantizer.grid()
            if any(tuple(part.shape) != expected for part in grid):
                found = " and ".join(str(tuple(part.shape)) for part in grid)
                raise UserError(
                    f"quantizer {plugin}: grid returned {found} for {name}; return scale and zero point {expected}."
                )
            weight = quantizer()
        if weight.shape != linear.weight.shape:
            raise UserError(
                f"quantizer {plugin}: forward returned {tuple(weight.shape)} for {name}; return the weight, "
                f"{tuple(linear.weight.shape)}."
            )
        if not weight.isfinite().all():
            raise UserError(f"quantizer {plugin}: forward returned NaN or infinity for {name} before any training.")
        self._replace(name, QuantizedLinear(quantizer, linear.bias, self.activation_checkpointing))

    def ship(self) -> dict[str, QuantizedTensor]:
        """Turn trained layers back into linear layers with the weights that ship, and return those by name."""
        trained = {name: m for name, m in self.modules_by_name().items() if isinstance(m, QuantizedLinear)}
        shipped = {name: module.quantizer.export() for name, module in trained.items()}
        for name, quantized in shipped.items():
            weight = quantized.dequantize().float()
            bias = trained[name].bias
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                linear.bias = bias
            self._replace(name, linear)
        return shipped

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's outputs (B, T, D) of its inputs, both with what travels in columns behind D."""
        if self.passage is None:
            for layer, arguments in zip(self.layers, self._arguments, strict=True):
                hidden = _hidden(self._run(layer, hidden, arguments))
            return hidden
        hidden, state = self.passage.unpack(hidden, self.first)
        every = self.passage.arguments_of(state, self.first, len(self.layers)) or self._arguments
        for layer, arguments in zip(self.layers, every, strict=True):
            given = self.passage.given(arguments, state, hidden.dtype)
            output = self._run(layer, hidden, given)
            hidden, state = _hidden(output), self.passage.after(output, given, state)
        return self.passage.pack(hidden, state, self.first + len(self.layers))

    def hidden_states(self, outputs: Tensor) -> Tensor:
        """Return the hidden states (…, D) among outputs or inputs, without what travels behind them."""
        return outputs if self.passage is None else outputs[..., : self.passage.width]

    def _run(self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        here = {name: _to(value, hidden.device) for name, value in arguments.items()}
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, hidden, use_reentrant=False, **here)
        return layer(hidden, **here)

    def _replace(self, name: str, module: nn.Module) -> None:
        for prefix, layer in zip(self.names, self.layers, strict=True):
            if name.startswith(f"{prefix}."):
                layer.set_submodule(name.removeprefix(f"{prefix}."), module)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
