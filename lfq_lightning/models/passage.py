"""What travels from block to block beside the hidden states, in columns behind them: tokens, and layers' own states."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

_DIGITS, _BASE = 3, 128  # of a whole number in a column each: exact in every floating point dtype, below two millions
_TOKENS = "tokens"

State = dict[tuple[Any, ...], Tensor]  # by argument, or by argument, key and number where that is a mapping


@dataclass(frozen=True)
class Slot:
    """One tensor among the columns.

    Args:
        place: its argument; in a mapping also its key, and its number there.
        shape: without batch and tokens.
        tokens: its dimension of tokens.
        dtype: its own.
    """

    place: tuple[Any, ...]
    shape: tuple[int, ...]
    tokens: int
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        """Return how many columns it takes."""
        return prod(self.shape) * (1 if self.dtype.is_floating_point else _DIGITS)

    @classmethod
    def of(cls, place: tuple[Any, ...], tensor: Tensor, length: int) -> "Slot":
        """Return the slot of a tensor (B, …) of `length` tokens. Raises ValueError if none of its sizes is that."""
        dims = [dim for dim in range(1, tensor.ndim) if tensor.shape[dim] == length]
        if not dims:
            raise ValueError(f"a layer hands on {place[0]} {tuple(tensor.shape)}, which has no dimension of tokens")
        rest = [size for dim, size in enumerate(tensor.shape) if dim not in (0, dims[0])]
        return cls(place, tuple(rest), dims[0], tensor.dtype)

    def write(self, tensor: Tensor) -> Tensor:
        """Return a tensor as columns (B, T, columns)."""
        rows = tensor.movedim(self.tokens, 1).flatten(2) if tensor.ndim > 2 else tensor[..., None]
        if self.dtype.is_floating_point:
            return rows
        rows = rows.long() + 1  # some indices are -1: none
        return torch.cat([rows // _BASE**digit % _BASE for digit in range(_DIGITS)], dim=-1)

    def read(self, columns: Tensor) -> Tensor:
        """Return the tensor of columns (B, T, columns)."""
        if not self.dtype.is_floating_point:
            digits = columns.round().long().chunk(_DIGITS, dim=-1)
            columns = sum(digit * _BASE**place for place, digit in enumerate(digits)) - 1
        shaped = columns.reshape(*columns.shape[:2], *self.shape)
        return shaped.movedim(1, self.tokens).to(self.dtype)


@dataclass
class Passage:
    """How the layers of a model hand on more than hidden states; one for all of its blocks.

    Args:
        shape: of a token's hidden states: (D,), or (streams, D) where a model has several.
        handed: position in a layer's outputs → the next layer's argument that it becomes.
        shared: arguments that are one mapping for all layers, which some of them fill.
        arguments: tokens (B, T) → each layer's arguments, where these depend on tokens or on the batch; else None.
        layouts: index of a block → what stands in the columns before it; known when the block before has run.
    """

    shape: tuple[int, ...]
    handed: dict[int, str]
    shared: dict[str, Mapping[Any, Any]]
    arguments: Callable[[Tensor], list[dict[str, Any]]] | None
    layouts: dict[int, list[Slot]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Return how many columns the hidden states take."""
        return prod(self.shape)

    @property
    def needed(self) -> bool:
        """Whether there is more than hidden states (B, T, D)."""
        return bool(self.handed or self.shared or self.arguments is not None or len(self.shape) > 1)

    def begin(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return what enters the first block: hidden states (B, T, …), and tokens (B, T) behind them if they count."""
        state: State = {} if self.arguments is None else {(_TOKENS,): tokens}
        return self.pack(hidden, state, 0)

    def pack(self, hidden: Tensor, state: State, block: int) -> Tensor:
        """Return hidden states (B, T, …) as columns (B, T, W), with what travels to a block behind them."""
        hidden = hidden.flatten(2)
        slots = [Slot.of(place, tensor, hidden.shape[1]) for place, tensor in state.items()]
        self.layouts[block] = slots
        columns = [slot.write(state[slot.place].to(hidden.device)).to(hidden.dtype) for slot in slots]
        return torch.cat([hidden, *columns], dim=-1) if columns else hidden

    def unpack(self, stream: Tensor, block: int) -> tuple[Tensor, State]:
        """Invert `pack`: return hidden states (B, T, …) and what has travelled to a block."""
        hidden, state = stream[..., : self.width].unflatten(-1, self.shape), State()
        at = self.width
        for slot in self.layouts[block]:
            state[slot.place] = slot.read(stream[..., at : at + slot.columns])
            at += slot.columns
        return hidden, state

    def arguments_of(self, state: State, block: int, layers: int) -> list[dict[str, Any]] | None:
        """Return the arguments of a block's layers for the tokens that have travelled; None if they never change."""
        if self.arguments is None:
            return None
        return self.arguments(state[_TOKENS,].cpu())[block : block + layers]

    def given(self, arguments: dict[str, Any], state: State, dtype: torch.dtype) -> dict[str, Any]:
        """Return a layer's arguments with the states of the layers before it, none narrower than hidden states are."""
        given = {
            name: value.to(torch.promote_types(value.dtype, dtype))
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in arguments.items()
        }
        for name in self.handed.values():
            if name in given:
                given[name] = state.get((name,))
        for name, empty in self.shared.items():
            if name in given:
                given[name] = mapping = copy.copy(empty)
                for place, tensor in state.items():
                    if place[0] == name:
                        mapping[place[1]] = (*mapping.get(place[1], ()), tensor)  # type: ignore[index]
        return given

    def after(self, output: Any, given: dict[str, Any], state: State) -> State:
        """Return what travels on behind a layer, from its output and the arguments that it has had."""
        state = {place: tensor for place, tensor in state.items() if place == (_TOKENS,)}
        for position, name in self.handed.items():
            if isinstance(output, tuple) and isinstance(output[position], Tensor):
                state[name,] = output[position]
        for name in self.shared:
            for key, tensors in given.get(name, {}).items():
                state |= {(name, key, number): tensor for number, tensor in enumerate(tensors)}
        return state
