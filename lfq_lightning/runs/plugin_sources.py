"""The source code that a plugin's results depend on: its class, the classes below it, and what those files import."""

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lfq_lightning.registry import Plugin

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT.name


def with_terms(plugin: Plugin[Any]) -> Iterator[Plugin[Any]]:
    """Yield a plugin and those among its options, such as the terms of a weighted sum."""
    yield plugin
    waiting: list[Any] = list(plugin.options.values())
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Plugin):
            yield from with_terms(value)
        elif isinstance(value, list | tuple):
            waiting += value


def sources(plugin: Plugin[Any]) -> str:
    """Return the text of all files that a plugin's class depends on: of this package, or from its own folder."""
    return _sources(plugin.cls)  # type: ignore[arg-type]


@cache
def _sources(cls: type) -> str:
    modules = (sys.modules[base.__module__] for base in cls.__mro__ if base is not object)
    files = [Path(inspect.getfile(module)).resolve() for module in modules if hasattr(module, "__file__")]
    home = Path(inspect.getfile(cls)).resolve().parent
    waiting = [file for file in files if _ours(file, home)]
    found: dict[Path, str] = {}
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = file.read_text(encoding="utf-8")
            waiting += _imported(found[file], file.parent)
    return "\0".join(found[file] for file in sorted(found, key=lambda file: (file.name, str(file))))


def _ours(file: Path, home: Path) -> bool:
    return _ROOT in file.parents or file.parent == home


def _imported(text: str, beside: Path) -> list[Path]:
    """Return the files of this package, or beside the importing one, that a module's text imports anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    places = [(_ROOT.parent if name.split(".")[0] == _PACKAGE else beside).joinpath(*name.split(".")) for name in names]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return [file for file in files if file.is_file()]
