"""Experts of a mixture as linear layers of their own: what quantizers, shards and engines know by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

_EXPERTS = ".experts."


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) · up(x)).

    Args:
        names: of its linear layers gate, up and down, as checkpoints call them.
        hidden: D, the model's width.
        inner: its own width.
        activation: transformers' name of it.
    """

    def __init__(self, names: tuple[str, str, str], hidden: int, inner: int, activation: str) -> None:
        super().__init__()
        self.names = names
        for name, shape in zip(names, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True):
            self.add_module(name, nn.Linear(*shape, bias=False))
        self.activation = ACT2FN[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expert's outputs (tokens, D) of hidden states (tokens, D)."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.activation(gate(hidden)) * up(hidden))


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


def split_experts(model: nn.Module, names: tuple[str, str, str], config: PretrainedConfig) -> None:
    """Replace every fused `experts` module of a model on the meta device by an ExpertList.

    Args:
        names: of an expert's linear layers gate, up and down.
    """
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            count, hidden, inner = module.get_parameter("down_proj").shape
            experts = [Expert(names, hidden, inner, config.hidden_act) for _ in range(count)]
            model.set_submodule(name, ExpertList(experts).eval().requires_grad_(False))


def router_names(module: nn.Module) -> list[str]:
    """Return the names of what chooses experts: no linear layer here, but one to other engines, never quantised."""
    lists = (name for name, inner in module.named_modules() if isinstance(inner, ExpertList))
    return [name.removesuffix("experts") + "gate" for name in lists]


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
    experts = sizes.get("num_experts") or sizes.get("num_local_experts") or 1
    share = sizes.get("num_experts_per_tok", 1) / experts
    return lambda name: share if in_expert(name) else 1.0
