"""Find where a scaling of a layer's inputs can be folded, from who reads which tensor; every pair is checked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.experts import in_expert

_APART = 1e-3  # greatest change of what a block adds, in its standard deviations, that folding may make


@dataclass(frozen=True)
class Fold:
    """A module whose outputs can be divided by a vector, and the linear layers that read them and nothing else does.

    Args:
        source: a norm or a linear layer, full name.
        readers: full names, in the order of the forward.
        unit_offset: the norm multiplies by 1 + weight.
    """

    source: str
    readers: tuple[str, ...]
    unit_offset: bool = False


@torch.no_grad()
def find_folds(block: DecoderBlock, hidden: Tensor) -> list[Fold]:
    """Return the folds of a block, in the order of the forward; experts of a mixture have none.

    Whether a pair is one is seen from the block's outputs of `hidden` (B, T, D): with the source divided, and its
    readers multiplied, by random factors, they stay the same. The block is as before afterwards.
    """
    made, read, expected = _traced(block, hidden)
    linears = {name: linear for name, linear in block.linears().items() if not in_expert(name)}
    readers: dict[str, list[str]] = {}
    for name in read:
        readers.setdefault(next((norm for norm in made if _same(made[norm], read[name])), name), []).append(name)
    found: list[Fold] = []
    for norm_or_layer, names in readers.items():
        if norm_or_layer in made:
            candidates = [Fold(norm_or_layer, tuple(names), offset) for offset in (False, True)]
        else:
            width, parent = linears[names[0]].in_features, names[0].rpartition(".")[0]
            before = [name for name in read if name.rpartition(".")[0] == parent and name != names[0]]
            candidates = [Fold(name, tuple(names)) for name in before if linears[name].out_features == width]
        right = (each for each in candidates if _holds(block, each, hidden, expected))
        if (fold := next(right, None)) is not None:
            found.append(fold)
    return found


class FoundFolds:
    """The folds of blocks as they come; those of one layout have the same, and are looked for once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], list[Fold]] = {}

    def of(self, block: DecoderBlock, hidden: Tensor) -> list[Fold]:
        """Return the folds of a block, by full names; `hidden` (B, T, D) is what enters it."""
        layout = tuple(f"{_inner(block, name)} {tuple(p.shape)}" for name, p in block.tensors().items())
        if layout not in self._known:
            folds = find_folds(block, hidden)
            self._known[layout] = [_renamed(fold, lambda name: _inner(block, name)) for fold in folds]
        return [_renamed(fold, lambda name: _outer(block, name)) for fold in self._known[layout]]


def divide(source: nn.Module, scale: Tensor, dtype: torch.dtype, unit_offset: bool) -> Tensor:
    """Divide the outputs of a norm or linear layer by `scale` (I,), in place; return what they were divided by."""
    weight, bias = source.get_parameter("weight"), dict(source.named_parameters()).get("bias")
    if isinstance(source, nn.Linear):
        weight.copy_((weight / scale[:, None]).to(dtype))
    else:
        offset = 1.0 if unit_offset else 0.0
        before = weight + offset
        folded = (before / scale - offset).to(dtype)
        after = folded.float() + offset  # rounded: the readers make up for it
        left = (before == 0) | (after == 0)  # nothing there, or too little to be told from nothing: as it was
        weight.copy_(torch.where(left, weight, folded.float()))
        scale = torch.where(left, torch.ones_like(scale), before / after)
    if bias is not None:
        bias.copy_((bias / scale).to(dtype))
    return scale


def _traced(block: DecoderBlock, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return what each norm makes and what each linear layer reads, in the order of the forward, and the outputs."""
    made: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    hooks, linears = [], block.linears()
    for name, module in block.modules_by_name().items():
        if name in linears and not in_expert(name):
            hooks.append(module.register_forward_pre_hook(partial(_note_input, read, name)))
        elif "norm" in type(module).__name__.lower() and getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            hooks.append(module.register_forward_hook(partial(_note_output, made, name)))
    try:
        return made, read, block(hidden)
    finally:
        for hook in hooks:
            hook.remove()


def _note_input(read: dict[str, Tensor], name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
    read.setdefault(name, given[0])


def _note_output(made: dict[str, Tensor], name: str, _: nn.Module, __: object, output: Tensor) -> None:
    made.setdefault(name, output)


def _same(made: Tensor, read: Tensor) -> bool:
    """Tell whether a layer reads what a norm has made, all of it."""
    return made.data_ptr() == read.data_ptr() and made.numel() == read.numel()


def _holds(block: DecoderBlock, fold: Fold, hidden: Tensor, expected: Tensor) -> bool:
    """Try a fold with random factors of ½ … 2."""
    modules = block.modules_by_name()
    touched = [p for name in (fold.source, *fold.readers) for p in modules[name].parameters()]
    saved = [p.detach().clone() for p in touched]
    width = modules[fold.readers[0]].get_parameter("weight").shape[1]
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(2 * torch.rand(width, generator=generator) - 1).to(hidden.device)
    if len(modules[fold.source].get_parameter("weight")) != width:
        return False
    try:
        scale = divide(modules[fold.source], scale, torch.float32, fold.unit_offset)
        for name in fold.readers:
            modules[name].get_parameter("weight").mul_(scale)
        change = (block(hidden) - expected).abs().max()  # of what travels beside hidden states too
    finally:
        for parameter, value in zip(touched, saved, strict=True):
            parameter.copy_(value)
    scaled = bool((scale != 1).any())  # a norm whose weights are all 0 cannot be divided: nothing was tried
    return scaled and bool(change < _APART * block.hidden_states(expected).sub(block.hidden_states(hidden)).std())


def _inner(block: DecoderBlock, name: str) -> str:
    """Return a name with the number of its layer in the block in place of the layer's name."""
    return next(f"{i}.{name.removeprefix(f'{p}.')}" for i, p in enumerate(block.names) if name.startswith(f"{p}."))


def _outer(block: DecoderBlock, name: str) -> str:
    number, _, inner = name.partition(".")
    return f"{block.names[int(number)]}.{inner}"


def _renamed(fold: Fold, rename: Callable[[str], str]) -> Fold:
    return replace(fold, source=rename(fold.source), readers=tuple(map(rename, fold.readers)))
