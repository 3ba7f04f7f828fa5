"""Check values of a run's config that the parser lets pass: no number, no value where one is needed."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lfq_lightning.errors import UserError

_MOST_SEED = 2**32 - 1  # what NumPy's generator takes


def check_config(config: dict[str, Any], classes: dict[str, type]) -> None:
    """Raise UserError naming the first key whose value is NaN, infinite, or null where it may not be.

    Args:
        config: the parsed config, dataclasses as they are.
        classes: whose constructor's arguments a section, or each entry of a list, holds; by the section's key.
    """
    seed = config.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed <= _MOST_SEED:
        raise UserError(f"seed_everything: {seed} must be 0 … {_MOST_SEED}.")
    for key, value in _leaves(config, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}: {value} is no finite number; give one, or leave the key out.")
    for section, cls in classes.items():
        value = config.get(section) or {}
        for where, values in _parts(section, value):
            _check_null(where, values, _needed(cls))


def _parts(section: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return a section's arguments, or those of each entry of a list, with its name."""
    listed = (
        [(f"{section}[{n}]", each) for n, each in enumerate(value)] if isinstance(value, list) else [(section, value)]
    )
    return [(where, vars(each) if is_dataclass(each) else each) for where, each in listed]


def _check_null(section: str, values: dict[str, Any], needed: set[str]) -> None:
    for name, value in values.items():
        if value is None and name in needed:
            raise UserError(f"{section}.{name}: null is no value for it; give one, or leave the key out.")


def _needed(cls: type) -> set[str]:
    """Return the arguments of a constructor that may not be None."""
    hints = get_type_hints(vars(cls)["__init__"])
    return {name for name in inspect.signature(cls).parameters if name in hints and not _takes_none(hints[name])}


def _takes_none(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_takes_none(each) for each in get_args(hint))
    return hint in (None, NoneType, Any)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the plain values in nested dicts, lists and dataclasses, with the path to each."""
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{number}]")
    else:
        yield key, value
