"""Experts of a mixture as linear layers of their own: what quantizers, shards and engines know by name."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from lfq_lightning.models.kept_linear import KeptLinear, kept_layers, packable

_EXPERTS = ".experts."
_ON_DISK = re.compile(r"\bexperts\.\*\.(\w+)\.weight$")  # as transformers' conversion mapping writes it


class _Blank(nn.Linear):
    """A linear layer whose weights are still to come: a model has tens of thousands, and drawing each takes a while."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


def _blank(inputs: int, outputs: int) -> nn.Linear:
    linear: nn.Linear = _Blank(inputs, outputs, bias=False)
    linear.__class__ = nn.Linear
    return linear


class Expert(nn.Module):
    """One MLP: down(activation(gate(x), up(x))), or down(activation(up(x))) without a gate.

    Args:
        names: of its linear layers, gate and up, or up alone, then down, as checkpoints call them.
        hidden: D, the width of what it reads and writes.
        inner: its own width.
        activation: of the outputs of gate and up, one behind the other (tokens, 2·inner), or of up's.
    """

    def __init__(self, names: tuple[str, ...], hidden: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names = names
        for name in names[:-1]:
            self.add_module(name, _blank(hidden, inner))
        self.add_module(names[-1], _blank(inner, hidden))
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expert's outputs (tokens, D) of hidden states (tokens, D)."""
        *inward, down = (self.get_submodule(name) for name in self.names)
        return down(self.activation(torch.cat([linear(hidden) for linear in inward], dim=-1)))


class ExpertList(nn.ModuleList):
    """Takes the place of transformers' experts, whose weights are one tensor for all of them; computes the same.

    Args:
        experts: in the order of the router's outputs.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.every = False  # call experts that no token chose too: with no tokens
        self.keep: Tensor | None = None  # (tokens,), False at those that are to see no expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (tokens, D); weights and indices are (tokens, k)."""
        outputs = torch.zeros_like(hidden_states)
        chosen = F.one_hot(top_k_index, num_classes=len(self)).permute(2, 1, 0)  # (experts, k, tokens)
        if self.keep is not None:
            chosen = chosen * self.keep.to(chosen.device)
        everyone = self.every or torch.is_grad_enabled()  # ranks must agree on what gets a gradient
        numbers = range(len(self)) if everyone else chosen.sum((1, 2)).nonzero().flatten().tolist()
        for number in numbers:
            place, tokens = torch.where(chosen[number])
            out = self[number](hidden_states[tokens]) * top_k_weights[tokens, place, None]
            outputs.index_add_(0, tokens, out.to(outputs.dtype))
        return outputs


def expert_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names on disk of an expert's linear layers, in the order of the forward: those that transformers'
    conversion mapping merges into one tensor for all experts; () if it merges none.
    """
    merged = {
        converter.target_patterns[0].rpartition(".")[2]: [
            found[1] for source in converter.source_patterns if (found := _ON_DISK.search(source))
        ]
        for converter in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(converter, WeightConverter)
    }
    inward = merged.get("gate_up_proj") or merged.get("up_proj") or []
    return (*inward, *merged["down_proj"]) if inward else ()


def split_experts(model: PreTrainedModel) -> None:
    """Replace every fused `experts` module of a model by an ExpertList without its weights, if checkpoints hold each
    expert's layers by themselves, and the linear layers that choose or weigh experts by a KeptLinear.

    Where transformers itself has another module for packed experts, it takes the place of the fused one.
    """
    for name, module in list(model.named_modules()):
        packed: dict[str, Any] = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__, {})
        if QuantizationMethod.COMPRESSED_TENSORS in packed.get("quantization_methods", ()):
            with next(module.parameters()).device:
                listed = packed["module_name"](model.config.get_text_config())
            model.set_submodule(name, listed.eval().requires_grad_(False))
    if not (names := expert_names(model)):
        return
    for name, module in list(model.named_modules()):
        if name.endswith(".experts") and hasattr(module, "_apply_gate"):  # else its forward is a code of its own
            fused = module.get_parameter("down_proj")
            count, hidden, inner = fused.shape
            with fused.device:
                experts = [Expert(names, hidden, inner, _activation(module, len(names) == 3)) for _ in range(count)]
            model.set_submodule(name, ExpertList(experts).eval().requires_grad_(False))
            mixture = model.get_submodule(name.rpartition(".")[0])
            for part, beside in list(mixture.named_modules()):
                chooses = packable(beside) and beside.out_features in (1, count)
                if chooses and not part.startswith("experts."):
                    mixture.set_submodule(part, KeptLinear(beside))


def _activation(experts: nn.Module, gated: bool) -> Callable[[Tensor], Tensor]:
    """Return what the model's own class does between an expert's products, without its weights."""
    shell = copy.copy(experts)
    vars(shell)["_parameters"] = {}
    chosen: Callable[[Tensor], Tensor] = shell._apply_gate if gated else shell.act_fn  # type: ignore[assignment]
    return chosen


def router_names(module: nn.Module) -> list[str]:
    """Return the names of what other engines know as linear layers and what is never quantised: what chooses or weighs
    experts, a KeptLinear, experts in one tensor.
    """
    mixtures = [name.removesuffix("experts") for name, _ in module.named_modules() if name.endswith(".experts")]
    beside = [
        mixture + part
        for mixture in mixtures
        for part, inner in module.get_submodule(mixture.removesuffix(".")).named_modules()
        if not packable(inner) and any(p.ndim > 1 for p in inner.parameters(recurse=False))
    ]
    return list(dict.fromkeys([*beside, *kept_layers(module)]))


@contextmanager
def seeing(block: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Let every expert of a block be called in each forward, and see only the tokens of `mask` (B, T); None is all."""
    lists = [module for module in block.modules() if isinstance(module, ExpertList)]
    for each in lists:
        each.every, each.keep = True, None if mask is None else mask.flatten()
    try:
        yield
    finally:
        for each in lists:
            each.every, each.keep = False, None


def in_expert(layer: str) -> bool:
    """Tell by its name whether a linear layer is one of an expert's."""
    return _EXPERTS in layer


def mixture_of(layer: str) -> str | None:
    """Return the name of the mixture that an expert's layer is in; None for other layers."""
    return layer.partition(_EXPERTS)[0] if in_expert(layer) else None


def without_number(layer: str) -> str:
    """Return the name that the same layer of all experts of a mixture has but for the expert's number."""
    before, experts, after = layer.partition(_EXPERTS)
    return before + experts + after.partition(".")[2]


def chosen_share(config: PretrainedConfig) -> Callable[[str], float]:
    """Return the share of tokens that a linear layer sees, by its name: of an expert k of E, of all other layers 1."""
    sizes = config.to_dict()
    counts = (sizes.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = next((count for count in counts if count), 1)
    share = sizes.get("num_experts_per_tok", 1) / experts
    return lambda name: share if in_expert(name) else 1.0
