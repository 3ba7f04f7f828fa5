"""ModelSkeleton: a model whose decoder blocks exist one at a time."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.experts import router_names
from lfq_lightning.models.head import Head
from lfq_lightning.models.kept_linear import kept_layers, packable
from lfq_lightning.models.meta_model import assign_weights, meta_model
from lfq_lightning.precision import cast


class _Recorder(nn.Module):
    """Stands in for a decoder block: keeps what it was called with and passes the hidden states on.

    Args:
        block: whose attributes the model may read.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        vars(self)["_block"] = block  # not a submodule: it has no weights
        self._parameter_names = [*inspect.signature(block.forward).parameters]
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.in_tuple = False  # the model expects the hidden states as the first of a tuple

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_block"], name)

    def forward(self, *positional: Any, **arguments: Any) -> Tensor | tuple[Tensor]:
        given = dict(zip(self._parameter_names, positional, strict=False)) | arguments
        hidden: Tensor = given.pop(self._parameter_names[0])
        self.hidden, self.arguments = hidden, given
        return (hidden,) if self.in_tuple else hidden


class ModelSkeleton:
    """The model on the meta device; embeddings, final norm and rotary tables are real, blocks are read on demand.

    Nothing here knows a family beyond the names in its row of the table: how a block is called is captured from one
    real forward of the model's own code, per block.

    Args:
        checkpoint: where weights come from.
        outer_dtype: of what is outside the blocks, and so of the tables that blocks are called with; the stored one if
            not said.
    """

    def __init__(self, checkpoint: Checkpoint, outer_dtype: torch.dtype | None = None) -> None:
        self.checkpoint = checkpoint
        self._outer_dtype = outer_dtype or checkpoint.dtype
        family = checkpoint.family
        self._model = meta_model(checkpoint.config, checkpoint.path)
        tied = set(self._model.all_tied_weights_keys)
        expected = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items() if name not in tied}
        checkpoint.check_layout(expected)
        blocks = self._model.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._meta_blocks = list(blocks)
        self._block_prefixes = [f"{family.blocks}.{i}." for i in range(len(blocks))]
        self._recorders = [_Recorder(block) for block in blocks]
        for i, recorder in enumerate(self._recorders):
            blocks[i] = recorder
        self._shapes: dict[int, dict[str, tuple[int, int]]] = {}
        self._ready = False

    def __len__(self) -> int:
        return len(self._meta_blocks)

    def block_name(self, index: int) -> str:
        return self._block_prefixes[index].removesuffix(".")

    @property
    def architecture(self) -> type[PreTrainedModel]:
        """The class of the model in transformers."""
        return type(self._model)

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Return full name → (O, I) of every linear layer of a block; reads no weights."""
        if index not in self._shapes:
            self._shapes[index] = {
                self._block_prefixes[index] + name: (module.out_features, module.in_features)
                for name, module in self._meta_blocks[index].named_modules()
                if packable(module)
            }
        return self._shapes[index]

    def parameter_sizes(self, index: int) -> dict[str, int]:
        """Return full name → number of values of every parameter of a block; reads no weights."""
        named = self._meta_blocks[index].named_parameters()
        return {self._block_prefixes[index] + name: parameter.numel() for name, parameter in named}

    def kind(self, index: int) -> str:
        """Return what kind of layer a block is: its type in the config, else its class."""
        types = getattr(self.checkpoint.text_config, "layer_types", None) or ()
        return types[index] if len(types) == len(self) else type(self._meta_blocks[index]).__name__

    def all_linears(self) -> list[str]:
        """Return the full names of all linear layers, those outside the blocks included."""
        return [*(name for index in range(len(self)) for name in self.linear_shapes(index)), *self.outside_linears()]

    def outside_linears(self) -> list[str]:
        """Return the full names of the linear layers outside the blocks."""
        outside = [name for name, module in self._model.named_modules() if isinstance(module, nn.Linear)]
        return list(dict.fromkeys([*outside, *kept_layers(self._model)]))

    def routers(self) -> list[str]:
        """Return the names of what chooses experts."""
        parts = zip(self._block_prefixes, self._meta_blocks, strict=True)
        return [prefix + name for prefix, block in parts for name in router_names(block)]

    def outer_names(self) -> list[str]:
        """Return the names of the stored tensors outside all blocks; a tied head is not among them."""
        return [name for name in self.checkpoint.names() if not name.startswith(tuple(self._block_prefixes))]

    def block_names(self, index: int) -> list[str]:
        """Return the stored tensors of one block, full names."""
        return [name for name in self.checkpoint.names() if name.startswith(self._block_prefixes[index])]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the first block's input (B, T, D) for tokens (B, T), and capture how each block is called."""
        self._materialise_outer()
        decoder = self._model.get_submodule(self.checkpoint.family.decoder)
        first = self._recorders[0]
        with torch.no_grad():
            try:
                decoder(input_ids=input_ids, use_cache=False)
            except (IndexError, RuntimeError, TypeError, ValueError):
                if first.hidden is None or first.in_tuple:
                    raise
                for recorder in self._recorders:
                    recorder.in_tuple = True
                decoder(input_ids=input_ids, use_cache=False)
        hidden = first.hidden
        assert hidden is not None
        for recorder in self._recorders:
            recorder.hidden = None
        return hidden

    def block(self, indices: range, activation_checkpointing: bool = False) -> DecoderBlock:
        """Read consecutive layers in fp32 as one block, ready for any number of sequences of the embedded length."""
        arguments = [self._recorders[index].arguments for index in indices]
        names = [self.block_name(index) for index in indices]
        return DecoderBlock(names, [self._layer(index) for index in indices], arguments, activation_checkpointing)

    def _layer(self, index: int) -> nn.Module:
        prefix = self._block_prefixes[index]
        tensors = self.checkpoint.tensors(self.block_names(index))
        layer = copy.deepcopy(self._meta_blocks[index])
        weights = {name.removeprefix(prefix): cast(tensor, torch.float32) for name, tensor in tensors.items()}
        layer.load_state_dict(weights, assign=True)
        return layer.requires_grad_(False)

    def initialise(self, block: nn.Module) -> None:
        """Let transformers give new weights to the modules of a block, as it does where some weights are absent."""
        around = self._model.get_submodule(self.checkpoint.family.blocks.rpartition(".")[0])
        owner = around if isinstance(around, PreTrainedModel) else self._model
        for module in block.modules():
            owner._init_weights(module)

    @property
    def logit_terms(self) -> tuple[float, float | None]:
        """The factor on the logits and their bound, None without one."""
        return self.checkpoint.family.logit_terms(self.checkpoint.config.to_dict())

    def head(self, dtype: torch.dtype) -> Head:
        """Return the frozen final norm (fp32) and LM head, its weight in `dtype`."""
        self._materialise_outer()
        family = self.checkpoint.family
        linear = self._model.get_submodule(family.head)
        assert isinstance(linear, nn.Linear)
        bias = linear.bias.to(dtype) if linear.bias is not None else None
        norm = copy.deepcopy(self._model.get_submodule(family.norm)).float()
        return Head(norm, linear.weight.detach().to(dtype), bias, *self.logit_terms)

    def _materialise_outer(self) -> None:
        if self._ready:
            return
        stored = self.checkpoint.tensors(self.outer_names())
        tensors = {name: cast(tensor, self._outer_dtype) for name, tensor in stored.items()}
        assign_weights(self._model, tensors, self.checkpoint.path)
        self._ready = True
