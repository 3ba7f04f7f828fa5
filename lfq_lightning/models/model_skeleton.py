"""ModelSkeleton: a model whose decoder blocks exist one at a time."""

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.experts import router_names
from lfq_lightning.models.head import Head, Tail
from lfq_lightning.models.kept_linear import kept_layers, packable
from lfq_lightning.models.meta_model import assign_weights, meta_model
from lfq_lightning.models.passage import Passage
from lfq_lightning.precision import cast

_PROBE = torch.arange(7)[None]  # tokens that a model is looked at with
_MOST_OUTPUTS = 3  # of a layer, beside the hidden states


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
        self.calls = 0  # in the last forward of the model
        self.beside: list[object] | None = None  # what it gives beside the hidden states, if the model expects a tuple

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_block"], name)

    def forward(self, *positional: Any, **arguments: Any) -> Any:
        given = dict(zip(self._parameter_names, positional, strict=False)) | arguments
        hidden: Tensor = given.pop(self._parameter_names[0])
        self.hidden, self.arguments = hidden, given
        self.calls += 1
        return hidden if self.beside is None else (hidden, *self.beside)


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
        config = copy.deepcopy(checkpoint.config)
        config.dtype = self._outer_dtype  # tables, such as scales of embeddings, are made in it
        self._model = meta_model(config, checkpoint.path)
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
        self._passage: Passage | None = None
        self._tail: list[str] = []
        self._shipped: dict[str, Tensor] = {}

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

    @property
    def outer_layers(self) -> dict[str, str]:
        """Return what can be quantised outside the blocks: the full names of `embeddings` and `head`, one if tied."""
        family = self.checkpoint.family
        return {"embeddings": family.embeddings, "head": family.embeddings if self.checkpoint.tied else family.head}

    def outer_shape(self, name: str) -> tuple[int, int]:
        """Return the shape (V, D) of embeddings or head by full name."""
        rows, columns = self._model.get_parameter(f"{name}.weight").shape
        return rows, columns

    def ship(self, weights: dict[str, Tensor]) -> None:
        """Take note of the weights (V, D) that ship of embeddings and head, by full name, where they are quantised."""
        self._shipped = weights

    def embed(self, input_ids: Tensor, shipped: bool = False) -> Tensor:
        """Return the first block's input (B, T, D) for tokens (B, T), and capture how each block is called.

        What travels to the block beside hidden states stands in columns behind D. With `shipped`, by the embeddings
        that ship.
        """
        passage, name = self._found(), self.checkpoint.family.embeddings
        if not shipped or name not in self._shipped:
            return passage.begin(self._record(input_ids), input_ids)
        module = self._model.get_submodule(name)
        kept = self._model.get_parameter(f"{name}.weight")
        module.weight = nn.Parameter(self._shipped[name].to(kept.dtype), requires_grad=False)
        try:
            return passage.begin(self._record(input_ids), input_ids)
        finally:
            module.weight = kept

    @property
    def width(self) -> int:
        """Return how many columns of a stream are hidden states: D, or more where a model has several."""
        return self._found().width

    def block(self, indices: range, activation_checkpointing: bool = False, empty: bool = False) -> DecoderBlock:
        """Read consecutive layers in fp32 as one block, ready for any number of sequences of the embedded length.

        An `empty` one has no weights yet, and nothing is read.
        """
        arguments = [self._recorders[index].arguments for index in indices]
        names = [self.block_name(index) for index in indices]
        layers = [self._empty_layer(index) if empty else self._layer(index) for index in indices]
        passage = self._passage if self._passage is not None and self._passage.needed else None
        return DecoderBlock(names, layers, arguments, activation_checkpointing, passage, indices.start)

    @torch.no_grad()
    def _record(self, input_ids: Tensor) -> Tensor:
        """Run the model's own forward around its blocks; return what enters the first."""
        decoder, first = self._model.get_submodule(self.checkpoint.family.decoder), self._recorders[0]
        for expected in (None, *range(_MOST_OUTPUTS)):
            for recorder in self._recorders:
                recorder.calls = 0
            try:
                decoder(input_ids=input_ids, use_cache=False)
                break
            except (IndexError, RuntimeError, TypeError, ValueError):
                if first.hidden is None or expected == _MOST_OUTPUTS - 1:
                    raise
                following = 0 if expected is None else expected + 1
                for recorder in self._recorders:
                    recorder.beside = [object() for _ in range(following)]
        hidden = first.hidden
        assert hidden is not None
        for recorder in self._recorders:
            recorder.hidden = None
        return hidden

    def _found(self) -> Passage:
        """Return how blocks are called and what is behind them, which is looked for once."""
        if self._passage is None:
            self._materialise_outer()
            self._tail = self._find_tail()
            self._passage = self._find_passage()
        return self._passage

    @torch.no_grad()
    def _find_tail(self) -> list[str]:
        """Return the modules between the last block and the head, each of which reads what the one before has made."""
        family = self.checkpoint.family
        around, beside = self._model.get_submodule(family.blocks.rpartition(".")[0]), family.blocks.rpartition(".")[2]
        called: list[tuple[str, Tensor, Tensor]] = []

        def note(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                called.append((name, given[0], output))

        others = [(name, module) for name, module in around.named_children() if name != beside]
        hooks = [module.register_forward_hook(partial(note, name)) for name, module in others]
        hooks += [recorder.register_forward_hook(lambda *_: called.clear()) for recorder in self._recorders]
        try:
            now = self._record(_PROBE)
        finally:
            for hook in hooks:
                hook.remove()
        prefix = family.blocks.removesuffix(beside)
        tail: list[str] = []
        for name, given, output in called:
            if given.data_ptr() == now.data_ptr() and given.shape == now.shape:
                tail.append(prefix + name)
                now = output
        return tail or [family.norm]

    def _find_passage(self) -> Passage:
        """See what layers hand on, and whether their arguments depend on tokens or on the batch, by calling twice."""
        input_ids, checkpoint = _PROBE, self.checkpoint
        hidden = self._record(input_ids)
        refusal = f"{checkpoint.path}: model type {checkpoint.config.model_type!r} cannot be streamed block by block"
        if any(recorder.calls != 1 for recorder in self._recorders):
            raise UserError(f"{refusal}: some of its layers are called more than once.")
        if hidden.shape[:2] != input_ids.shape:
            raise UserError(f"{refusal}: its hidden states are {tuple(hidden.shape)}, not (sequences, tokens, …).")
        shape = tuple(hidden.shape[2:])
        before = [recorder.arguments for recorder in self._recorders]
        handed: dict[int, str] = {}
        for recorder, arguments in zip(self._recorders, before[1:], strict=False):
            for position, given in enumerate(recorder.beside or (), start=1):
                for name in (name for name, value in arguments.items() if value is given):
                    handed[position] = name
        shared = {
            name: value
            for name, value in before[0].items()
            if isinstance(value, Mapping)
            and not value
            and len(before) > 1
            and all(arguments.get(name) is value for arguments in before)
        }
        self._record(torch.cat([input_ids, input_ids + 1]))
        after = [recorder.arguments for recorder in self._recorders]
        travelling = {*handed.values(), *shared}
        varies = any(
            not _alike(value, then.get(name))
            for now, then in zip(before, after, strict=True)
            for name, value in now.items()
            if name not in travelling
        )

        def arguments_of(tokens: Tensor) -> list[dict[str, Any]]:
            self._record(tokens)
            return [recorder.arguments for recorder in self._recorders]

        return Passage(shape, handed, shared, arguments_of if varies else None)

    def _layer(self, index: int) -> nn.Module:
        prefix = self._block_prefixes[index]
        tensors = self.checkpoint.tensors(self.block_names(index))
        layer = self._empty_layer(index)
        weights = {name.removeprefix(prefix): cast(tensor, torch.float32) for name, tensor in tensors.items()}
        layer.load_state_dict(weights, assign=True)
        return layer.requires_grad_(False)

    def _empty_layer(self, index: int) -> nn.Module:
        return copy.deepcopy(self._meta_blocks[index])

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
        """Return the frozen final norm (fp32) and LM head, its weight in `dtype`, beside the one that ships, if any."""
        self._materialise_outer()
        family = self.checkpoint.family
        linear = self._model.get_submodule(family.head)
        assert isinstance(linear, nn.Linear)
        bias = linear.bias.to(dtype) if linear.bias is not None else None
        passage = self._found()
        parts = [copy.deepcopy(self._model.get_submodule(name)).float() for name in self._tail]
        norm = parts[0] if len(parts) == 1 and len(passage.shape) == 1 else Tail(parts, passage.shape)
        shipped = self._shipped.get(self.outer_layers["head"])
        shipped = None if shipped is None else shipped.to(dtype)
        weight = linear.weight.detach().to(dtype)
        return Head(norm, weight, bias, *self.logit_terms, width=passage.width, shipped=shipped)

    def _materialise_outer(self) -> None:
        if self._ready:
            return
        stored = self.checkpoint.tensors(self.outer_names())
        tensors = {name: cast(tensor, self._outer_dtype) for name, tensor in stored.items()}
        assign_weights(self._model, tensors, self.checkpoint.path)
        self._ready = True


def _alike(one: Any, two: Any) -> bool:
    """Tell whether an argument for one sequence is, but for broadcasting, that for two of other tokens."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.ndim != two.ndim or any(a not in (1, b) for a, b in zip(one.shape, two.shape, strict=True)):
            return False
        return torch.equal(one.expand_as(two), two)
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(map(_alike, one, two))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_alike(value, two[key]) for key, value in one.items())
    return type(one) is type(two)
