"""TensorNames: how a model's tensors lie on disk, by transformers' own conversion mapping."""

import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming


class TensorNames:
    """Names on disk, names in the model, and the way between: tensors are renamed, and some of them merged or split.

    A merged tensor goes back to disk in one piece where its parts end in `.weight`: of such parts transformers reads
    the packed ones alone from a folder in compressed-tensors.

    Args:
        model: a tensor that transformers merges, and that is none of its own, lies on disk in its parts here too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        entries = get_model_conversion_mapping(model, add_legacy=False)
        self._model, self._expected = model, set(model.state_dict())
        self._fused: set[str] = set()  # experts that lie on disk in one tensor
        self._renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
        # a prefix is left off: transformers reads both names, and one of them is the model's
        back = [
            (entry, entry.reverse_transform()) for entry in reversed(entries) if not isinstance(entry, PrefixChange)
        ]
        self._back_renamings = [entry for _, entry in back if isinstance(entry, WeightRenaming)]
        self._back_converters = [entry for _, entry in back if isinstance(entry, WeightConverter)]
        self._in_parts = [
            entry
            for forward, entry in back
            if isinstance(entry, WeightConverter)
            and not all(source.endswith(".weight") for source in forward.source_patterns)
        ]

    @property
    def renamed(self) -> bool:
        """Whether any tensor may have another name on disk."""
        return bool(self._renamings)

    def model_name(self, name: str) -> str:
        """Return the name in the model of a tensor on disk that is neither merged nor split."""
        return self._own(_renamed(name, self._renamings), name)

    def stored_name(self, name: str) -> str:
        """Return the name on disk of a tensor of the model that is neither merged nor split."""
        return _renamed(name, self._back_renamings)

    def converted(self, name: str) -> bool:
        """Tell whether a tensor of the model is merged or split while it is loaded."""
        return _converter_of(name, self._back_converters)[0] is not None

    def packable(self, layer: str) -> bool:
        """Tell whether transformers finds a packed linear layer of the model by its name on disk."""
        part = f"{layer}.weight_packed"
        back = _renamed(self.stored_name(part), self._renamings)
        return _converter_of(part, self._in_parts)[0] is None and _converter_of(back, self._converters)[0] is None

    def is_extra(self, name: str) -> bool:
        """Tell whether transformers passes over a tensor that is none of the model's, such as a further head's."""
        passed_over = self._model._keys_to_ignore_on_load_unexpected or ()
        return name not in self._expected and any(re.search(pattern, name) for pattern in passed_over)

    def groups(self, stored: Iterable[str]) -> list[tuple[str, ...]]:
        """Return which tensors on disk become tensors of the model together."""
        found: dict[str, list[str]] = {}
        for name in sorted(stored):
            found.setdefault(self._target(name)[0], []).append(name)
        return [tuple(names) for names in found.values()]

    def to_model(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's tensors, by name, of those on disk; whole groups, on any device, meta too."""
        found: dict[str, Tensor] = {}
        waiting: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=_natural):
            target, converter, pattern = self._target(name)
            if converter is None or pattern is None:
                found[target] = tensors[name]
            else:
                waiting.setdefault(target, deepcopy(converter)).add_tensor(target, name, pattern, tensors[name])  # type: ignore[arg-type]
        for target, converter in waiting.items():
            found |= self._run(converter, target)
        for name in [name for name in found if name not in self._expected]:
            if parts := self._single_experts(name, found[name]):
                del found[name]
                found |= parts
        return found

    def to_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors on disk, by name, of those of the model: what `to_model` has taken, in their order."""
        found: dict[str, Tensor] = {}
        waiting: dict[str, WeightConverter] = {}
        for name, tensor in tensors.items():
            converter, target, pattern = _converter_of(name, self._in_parts)
            if converter is None or pattern is None:
                found[_renamed(name, self._back_renamings)] = tensor
            else:
                waiting.setdefault(target, deepcopy(converter)).add_tensor(target, name, pattern, tensor)  # type: ignore[arg-type]
        for target, converter in waiting.items():
            parts = self._run(converter, target)
            found |= {_renamed(name, self._back_renamings): part.contiguous() for name, part in parts.items()}
        return found

    def to_source(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the model as full precision has them on disk, single experts in one tensor again."""
        rest, fused = dict(tensors), dict[str, Tensor]()
        first = ".0.gate_proj.weight"
        for base in [name.removesuffix(first) for name in tensors if name.endswith(first)]:
            if f"{base}.gate_up_proj" in self._fused:
                count = sum(name.startswith(f"{base}.") and name.endswith(".gate_proj.weight") for name in tensors)
                gate, up, down = (
                    torch.stack([rest.pop(f"{base}.{i}.{part}.weight").T for i in range(count)])
                    for part in ("gate_proj", "up_proj", "down_proj")
                )
                fused |= {f"{base}.gate_up_proj": torch.cat([gate, up], dim=-1), f"{base}.down_proj": down}
        return self.to_disk(rest) | fused

    def _single_experts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the layers of single experts (O, I) of a tensor of all (E, I, O), if the model has those instead."""
        base, _, last = name.rpartition(".")
        halves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
        if not halves or f"{base}.0.{halves[0]}.weight" not in self._expected:
            return {}
        self._fused.add(name)
        parts = zip(halves, tensor.chunk(len(halves), dim=-1), strict=True)
        return {f"{base}.{i}.{h}.weight": e.T.contiguous() for h, each in parts for i, e in enumerate(each.unbind(0))}

    def _target(self, stored: str) -> tuple[str, WeightConverter | None, str | None]:
        """Return the (first) tensor of the model that a tensor on disk becomes, and what converts it."""
        name = _renamed(stored, self._renamings)
        converter, target, pattern = _converter_of(name, self._converters)
        if converter is not None and target in self._expected:
            return target, converter, pattern
        return self._own(name, stored), None, None

    def _own(self, renamed: str, stored: str) -> str:
        """Return the new name, or the old one if that alone is the model's, as transformers does."""
        return stored if renamed not in self._expected and stored in self._expected else renamed

    def _run(self, converter: WeightConverter, target: str) -> dict[str, Tensor]:
        found: dict[str, Any] = converter.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _converter_of(name: str, converters: list[WeightConverter]) -> tuple[WeightConverter | None, str, str | None]:
    """Return the first converter that takes a name, what it becomes, and the pattern that it fits."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return converter, target, pattern
    return None, name, None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 behind layer 9, as transformers merges lists."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
