"""Find the parts of a model that no row of families.py names, from its own modules and code; reads no weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from lfq_lightning.errors import UserError, named, said
from lfq_lightning.models.families import FAMILIES, Family
from lfq_lightning.models.kept_linear import packable
from lfq_lightning.models.meta_model import empty_model, parted_model
from lfq_lightning.models.tensor_names import TensorNames

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
_OTHER_TASKS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "ForPreTraining")
_NO_LIMIT = 2**20
_FAR = 1e4  # times random hidden states: where a bound is reached
_SMALL_HEAD = 16  # rows of the head that stands in for the model's while its logits are looked at


class _Output(BaseModelOutputWithPast):
    """A decoder's output of which only the hidden states are there, whatever else the model asks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands in for the decoder: its hidden states are given.

    Args:
        hidden: (B, T, D).
        decoder: whose numbers the model may read.
    """

    def __init__(self, hidden: Tensor, decoder: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        vars(self)["_decoder"] = decoder  # not a submodule

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # torch asks for protocols that a module does not have
            raise AttributeError(name)
        found = getattr(vars(self)["_decoder"], name, self)
        return self if isinstance(found, nn.Module) else found  # a part that the model calls in the decoder's place

    def forward(self, *_: object, **__: object) -> _Output:
        return _Output(last_hidden_state=self.hidden)


def family_of(config: PretrainedConfig, source: object) -> Family:
    """Return where the parts of a model are: its row of the table, or what is found.

    Raises UserError, naming `source` and what is in the way, for a model that cannot be taken apart.
    """
    return FAMILIES[config.model_type] if config.model_type in FAMILIES else discover(config, source)


def context_length(config: PretrainedConfig) -> int:
    """Return how many tokens a model reads; where its config names no limit (ALiBi, state spaces), a million."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT


def discover(config: PretrainedConfig, source: object) -> Family:
    """Find decoder, blocks, final norm, head and embeddings, and what becomes of the logits. Raises UserError."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise _refused(config, source, "transformers has no class for it that writes text")
    for name in config.architectures or ():
        if name.endswith(_OTHER_TASKS):
            raise _refused(config, source, f"its config names {name}, which does not write text")
    for key in _SIZES:
        if not isinstance(getattr(config.get_text_config(), key, None), int):
            raise _refused(config, source, f"its config has no {key} of its own")
    model, tensor_names = parted_model(config, source)
    blocks, layers = _blocks(model, config, source)
    if not any(map(packable, layers.modules())):
        largest = max(layers.named_parameters(), key=lambda item: item[1].numel())[0]
        raise _refused(config, source, f"nothing in its layers is a linear layer that can be packed ({largest})")
    decoder, head = _decoder(model, blocks), model.get_output_embeddings()
    if not decoder or not isinstance(head, nn.Linear):
        raise _refused(config, source, "its head is no linear layer behind a decoder")
    names = {module: name for name, module in model.named_modules()}
    embeddings = names[model.get_input_embeddings()]
    norm = _final_norm(model, blocks, config, source)
    terms = _logit_terms(empty_model(config, source), decoder, names[head], config, source)
    return Family(decoder, blocks, norm, names[head], None, names=tensor_names, embeddings=embeddings, terms=terms)


def family_of_names(config: PretrainedConfig, names: TensorNames) -> Family:
    """Return how the tensors of a packed model are called; its other parts may not be those of the model."""
    return FAMILIES.get(config.model_type) or Family(names=names)


def _refused(config: PretrainedConfig, source: object, reason: str) -> UserError:
    return UserError(f"{source}: model type {config.model_type!r} cannot be taken apart: {reason}.")


def _blocks(model: PreTrainedModel, config: PretrainedConfig, source: object) -> tuple[str, nn.ModuleList]:
    """Return the list of decoder layers, the largest one of that length, and its name; in some models a layer of the
    list counts as two.
    """
    count = config.get_text_config().num_hidden_layers
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lengths = (count, count // 2)
    lists = next((found for n in lengths if (found := {k: v for k, v in every.items() if len(v) == n})), None)
    if not lists:
        raise _refused(config, source, f"it has no list of its {count} layers")
    return max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _decoder(model: PreTrainedModel, blocks: str) -> str:
    """Return the part of the model that turns tokens into what its head reads; "" if it has none of its own."""
    return model.base_model_prefix if hasattr(model, model.base_model_prefix) else blocks.partition(".")[0]


def _final_norm(model: PreTrainedModel, blocks: str, config: PretrainedConfig, source: object) -> str:
    """Return the one norm outside the blocks; of several, the one that is defined behind them, beside them, or is
    called norm there.
    """
    names = [name for name, _ in model.named_modules()]
    last = max(i for i, name in enumerate(names) if name == blocks or name.startswith(f"{blocks}."))
    outside = [
        (i, name)
        for i, name in enumerate(names)
        if not name.startswith(f"{blocks}.") and "norm" in type(model.get_submodule(name)).__name__.lower()
    ]
    behind = [name for i, name in outside if i > last]
    chosen = behind or [name for _, name in outside]
    parent = blocks.rpartition(".")[0]
    for closer in (lambda name: name.rpartition(".")[0] == parent, lambda name: name == f"{parent}.norm"):
        if len(chosen) > 1:
            chosen = [name for name in chosen if closer(name)]
    if len(chosen) != 1:
        raise _refused(config, source, f"it has {len(chosen)} norms outside its layers that may be the last, not one")
    return chosen[0]


@torch.no_grad()
def _logit_terms(
    model: PreTrainedModel, decoder: str, head: str, config: PretrainedConfig, source: object
) -> tuple[float, float | None]:
    """Fit s and c of logits = s·z, or c·tanh(z / c), from what the model's own code makes of random hidden states.

    The model loses its decoder and its head to stand-ins.
    """
    width, generator = config.get_text_config().hidden_size, torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8, width, generator=generator)
    linear = nn.Linear(width, _SMALL_HEAD, bias=False)
    linear.weight.copy_(10 / math.sqrt(width) * torch.randn(_SMALL_HEAD, width, generator=generator))
    model.set_submodule(decoder, _Given(hidden, model.get_submodule(decoder)))
    model.set_submodule(head, linear)
    behind = "its code does more between decoder and logits than a linear head does"
    given = model.get_submodule(decoder)
    with said(lambda error: str(_refused(config, source, f"{behind} ({named(error)})"))):
        logits, far = (_logits(model, given, each) for each in (hidden, _FAR * hidden))
    z = linear(hidden)
    scale = float((logits * z).sum() / (z * z).sum())
    if torch.allclose(logits, scale * z, rtol=1e-4, atol=1e-4):
        return (1.0 if abs(scale - 1) < 1e-6 else scale), None
    cap = float(far.abs().max())
    if torch.allclose(logits, cap * torch.tanh(z / cap), rtol=1e-4, atol=1e-4):
        return 1.0, cap
    raise _refused(config, source, "its logits are neither s·z nor c·tanh(z / c) of its head's products z")


def _logits(model: PreTrainedModel, given: nn.Module, hidden: Tensor) -> Tensor:
    given.hidden = hidden
    logits: Tensor = model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False).logits
    return logits
