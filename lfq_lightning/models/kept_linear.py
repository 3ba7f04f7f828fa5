"""KeptLinear: a linear layer that stays in full precision, and the finding of those that must."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lfq_lightning.models.tensor_names import TensorNames


class KeptLinear(nn.Module):
    """Takes the place of a linear layer that is never quantised: the same product.

    Args:
        linear: (O, I).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return x Wᵀ + b (…, O) of hidden states (…, I)."""
        return F.linear(hidden, self.weight, self.bias)


def keep_linears(model: PreTrainedModel, names: TensorNames) -> None:
    """Settle which modules of a model are linear layers that a packed one can stand for: those that stay nn.Linear.

    KeptLinear takes the place of a layer whose weight the model's own code reads, which a packed layer does not have,
    and of one that transformers would not find by the names of its packed parts. A subclass of nn.Linear is
    left as it is, and never quantised: loaders keep its forward, which knows no packed weight.
    """
    anywhere = _read_weights(type(model), PreTrainedModel)
    read = {cls: _read_weights(cls, nn.Module) for cls in {type(module) for module in model.modules()}}
    for name, module in list(model.named_modules()):
        for part, linear in list(module.named_children()):
            if not packable(linear) or linear is model.get_output_embeddings():
                continue
            if part in anywhere | read[type(module)] or not names.packable(f"{name}.{part}"):
                module.set_submodule(part, KeptLinear(linear))


def packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether a module is a linear layer that a packed one can stand for: nn.Linear itself."""
    return type(module) is nn.Linear


def kept_layers(module: nn.Module) -> Iterator[str]:
    """Yield the names of what loaders may take for linear layers and what is never quantised."""
    for name, inner in module.named_modules():
        if isinstance(inner, KeptLinear | nn.Linear) and not packable(inner):
            yield name


def _read_weights(cls: type, kind: type) -> frozenset[str]:
    """Return the names of the parts whose `.weight` is named in the code of a class or of its bases of one kind."""
    ours = [base for base in cls.__mro__ if issubclass(base, kind) and base not in (nn.Module, PreTrainedModel)]
    return frozenset().union(*(_weights_named_in(_source(base)) for base in ours))


def _source(cls: type) -> str:
    try:
        return "" if cls.__module__.startswith("torch.") else textwrap.dedent(inspect.getsource(cls))
    except OSError:  # a class without a source; the check of the streams sees what it does
        return ""


@cache
def _weights_named_in(source: str) -> frozenset[str]:
    """Return each `part` that stands as `….part.weight` in a piece of code."""
    return frozenset(
        node.value.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute)
    )
