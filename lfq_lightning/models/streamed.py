"""A model streamed block by block, against the model in one piece."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lfq_lightning.errors import UserError, named, said
from lfq_lightning.models.checkpoints import Checkpoint, open_checkpoint
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.experts import seeing
from lfq_lightning.models.model_skeleton import ModelSkeleton

_TOKENS = 12  # of each sequence that a model is checked with
_APART = 1e-3  # greatest difference of two logits, in standard deviations of the logits
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # of layers, in configs
_LAYERS = 8  # the most of a model that is checked in one piece


def streamed_logits(folder: str | Path, input_ids: Tensor) -> Tensor:
    """Return the logits (B, T, V), fp32, of a full-precision model whose blocks run one after the other, as a run
    streams them; `input_ids` are (B, T). Memory holds one block at a time.

    Raises UserError for a model that cannot be streamed.
    """
    return _streamed(ModelSkeleton(open_checkpoint(str(folder)), torch.float32), input_ids)


class _Watched(nn.Linear):
    """A linear layer that notes how it is used: what a packed one cannot do is seen.

    Attributes:
        odd: what else than a product of rows it was used for.
        called: its product was asked for.
    """

    odd: str | None
    called: bool

    def forward(self, rows: Tensor) -> Tensor:
        if rows.dim() not in (2, 3) and not (rows.dim() == 4 and rows.shape[1] == 1):
            vars(self)["odd"] = f"gets inputs of {rows.dim()} dimensions"
        vars(self)["called"] = True
        return F.linear(rows, self._parameters["weight"], self._parameters["bias"])  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            vars(self)["odd"] = "has its weight read by the model's code, which a packed layer does not have"
        return super().__getattr__(name)


@torch.no_grad()
def _streamed(skeleton: ModelSkeleton, input_ids: Tensor, layers: int | None = None, watch: bool = False) -> Tensor:
    hidden = torch.cat([skeleton.embed(row[None]).float() for row in input_ids])
    for index in range(len(skeleton) if layers is None else layers):
        block = skeleton.block(range(index, index + 1))
        watched = _watch(block) if watch else []
        if watched:
            skeleton.initialise(_packed_twin(block, watched))
        with seeing(block, None):
            hidden = block(hidden)
        _check_watched(block, watched)
    head = skeleton.head(torch.float32)
    return head.logits(head.readout(hidden))


def _watch(block: DecoderBlock) -> list[str]:
    """Turn the linear layers of a block into watched ones; return their names."""
    linears = block.linears()
    for linear in linears.values():
        linear.__class__ = _Watched
        vars(linear).update(odd=None, called=False)
    return [*linears]


def _packed_twin(block: DecoderBlock, names: list[str]) -> DecoderBlock:
    """Return a copy whose linear layers have no weight, as packed ones have none."""
    twin = copy.deepcopy(block)
    modules = twin.modules_by_name()
    for name in names:
        modules[name].__class__ = nn.Linear
        modules[name]._parameters.pop("weight")
    return twin


def _check_watched(block: DecoderBlock, names: list[str]) -> None:
    """Raise ValueError for a layer that was used as no packed one can be."""
    modules = block.modules_by_name()
    for name in names:
        linear = modules[name]
        assert isinstance(linear, _Watched)
        if linear.odd is not None or not linear.called:
            raise ValueError(f"{name} {linear.odd or 'is never called'}")


@torch.no_grad()
def check_streams(checkpoint: Checkpoint) -> None:
    """Check that the blocks, streamed, give the model's own logits, and that no token sees those behind it.

    A model of more layers is checked on its first ones, up to one of every kind. Raises UserError.
    """
    path, kind = checkpoint.path, checkpoint.config.model_type
    vocabulary, generator = checkpoint.text_config.vocab_size, torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (2, _TOKENS), generator=generator)
    tokens[1, :-1] = tokens[0, :-1]  # they differ in the last token
    tokens[1, -1] = (tokens[0, -1] + 1) % vocabulary
    with said(lambda error: f"{path}: model type {kind!r} cannot be streamed block by block ({named(error)})."):
        skeleton = ModelSkeleton(checkpoint, torch.float32)
        config, layers = _shortened(checkpoint.config, len(skeleton))
        streamed = _streamed(skeleton, tokens, layers, watch=True)
    own = _own(skeleton, config, layers)(input_ids=tokens, use_cache=False).logits
    apart = float((streamed - own).abs().max() / own.std())
    if not apart < _APART:
        raise UserError(
            f"{path}: model type {kind!r} is not streamed right: block by block its logits are {apart:.2g} "
            "standard deviations from its own; it cannot be quantised here."
        )
    if not torch.allclose(own[0, :-1], own[1, :-1], atol=1e-3 * float(own.std())):
        raise UserError(f"{path}: model type {kind!r} is no decoder: its tokens see those behind them.")


def _own(skeleton: ModelSkeleton, config: PretrainedConfig, layers: int) -> PreTrainedModel:
    """Return the model of the first layers as transformers loads it by the names on disk. Raises UserError."""
    checkpoint = skeleton.checkpoint
    names = skeleton.outer_names() + [name for index in range(layers) for name in skeleton.block_names(index)]
    stored = checkpoint.family.to_source(checkpoint.tensors(names))
    found: Any = skeleton.architecture.from_pretrained(
        None,
        config=config,
        state_dict=stored,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, loading = found
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    odd = sorted(str(key) for kind in kinds for key in loading[kind])
    if odd:
        raise UserError(
            f"{checkpoint.path}: transformers does not find {odd[0]} under the name that it would ship by; a model of "
            f"type {config.model_type!r} cannot be quantised here."
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _shortened(config: PretrainedConfig, layers: int) -> tuple[PretrainedConfig, int]:
    """Return the config of the first of `layers`, one of every kind among them, and their number."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    kinds = [*(getattr(text, "layer_types", None) or [None] * layers)][:layers]
    wanted = layers if layers <= _LAYERS else min(_LAYERS, max(kinds.index(kind) for kind in kinds) + 1)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:wanted])
        elif name in _COUNTS and isinstance(value, int):
            setattr(text, name, value * wanted // layers)
    return short, wanted
