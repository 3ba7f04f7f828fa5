"""One registry class; objectives, quantizers and callbacks each have one instance of it.

A plugin is one file with one registered class. Its name is the file's name, and so the YAML name and the test id.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from lfq_lightning.errors import UserError, named, one_line

T = TypeVar("T")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the cure for a misspelt word: the nearest known one, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}."


def plugin_name(cls: type) -> str:
    """Return the name of a plugin class: that of its file."""
    return cls.__module__.rpartition(".")[2]


@dataclass(frozen=True)
class Plugin(Generic[T]):
    """A registered class with every option filled in; `build(*values)` makes an instance."""

    name: str
    cls: type[T]
    options: dict[str, Any]

    def build(self, *values: Any) -> T:
        return self.cls(*values, **self.options)


class Registry(Generic[T]):
    """Names → classes of one kind.

    Args:
        kind: singular noun for messages ("objective"); entry points live in the group `lfq_lightning.<kind>s`.
        base: every plugin must be a concrete subclass of it, with a docstring and a `paper` (its source).
    """

    def __init__(self, kind: str, base: type[T]) -> None:
        self.kind = kind
        self.base = base
        self._classes: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator: register `cls` under the name of its file. Raises UserError on a duplicate or misfit."""
        name = plugin_name(cls)
        where = inspect.getfile(cls)
        if not issubclass(cls, self.base) or inspect.isabstract(cls):
            raise UserError(f"{where}: a {self.kind} must be a concrete subclass of {self.base.__name__}.")
        if not cls.__doc__ or not vars(cls).get("paper"):
            raise UserError(f"{where}: {cls.__name__} needs a docstring and `paper = '…'`, the source of its method.")
        package = Path(__file__).parent
        if package in Path(where).resolve().parents and not cls.__module__.startswith(f"{__package__}."):
            raise UserError(f"{where}: import it as {__package__}.…, not from the link at the top of the repository.")
        if name in self._classes:
            other = inspect.getfile(self._classes[name])
            raise UserError(f"{self.kind} {name!r} is defined twice, in {other} and {where}; rename one file.")
        self._classes[name] = cls
        return cls

    def names(self) -> list[str]:
        """Return every known name: our own files, then installed entry points, then `plugins:` files."""
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """Return the class called `name`; raises UserError with the nearest name."""
        self._load()
        if name not in self._classes:
            raise UserError(f"unknown {self.kind} {name!r}: {did_you_mean(name, self._classes)}")
        return self._classes[name]

    def options(self, name: str) -> dict[str, Any]:
        """Return the options of a plugin with their defaults: the keyword-only parameters of its constructor."""
        parameters = inspect.signature(self.get(name).__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def parse(self, value: str | dict[str, Any], elsewhere: Iterable[str] = ()) -> Plugin[T]:
        """Turn YAML (`mse` or `{name: mse, option: …}`) into a Plugin; names, options and types are checked.

        `elsewhere` are keys that stand beside the plugin's options but are not its own; only for the "did you mean".
        """
        if not isinstance(value, str | dict):
            raise UserError(f"{self.kind}: {value!r} is neither a name nor `{{name: …, option: …}}`.")
        options = {"name": value} if isinstance(value, str) else dict(value)
        if not isinstance(options.get("name"), str):
            raise UserError(f"{self.kind}: {value!r} has no name; write `{self.kind}: {{name: …}}`.")
        name = options.pop("name")
        cls, known = self.get(name), self.options(name)
        for key in options:
            if key not in known:
                raise UserError(
                    f"{self.kind} {name!r} has no option {key!r}: {did_you_mean(key, [*known, *elsewhere])}"
                )
        parser = ArgumentParser(exit_on_error=False)
        positional = {p for p in inspect.signature(cls.__init__).parameters if p not in known and p != "self"}
        parser.add_class_arguments(cls, None, skip=positional)
        try:
            parsed = parser.parse_object(options)
        except ArgumentError as error:
            raise UserError(f"{self.kind} {name!r}: {one_line(error)}") from error
        return Plugin(name, cls, parsed.as_dict())

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(f"{__package__}.{self.kind}s")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        for entry_point in entry_points(group=f"{__package__}.{self.kind}s"):
            entry_point.load()


def load_plugin_file(path: Path) -> None:
    """Run one foreign plugin file; the classes in it register themselves under the file's name."""
    if not path.is_file():
        raise UserError(f"plugins: there is no file {path}; give the path of a Python file.")
    if path.stem in sys.modules:
        if vars(sys.modules[path.stem]).get("__file__") == str(path.resolve()):
            return
        raise UserError(f"plugins: the name {path.stem!r} is taken by another module; rename {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # it may raise anything, and may even ask to leave
        del sys.modules[path.stem]
        raise UserError(f"plugins: {path} cannot be imported ({named(error)}); mend the file.") from error
