"""Read a run's YAML as text that says each thing once."""

from pathlib import Path
from typing import Any

import yaml

from lfq_lightning.data.read_text import read_text
from lfq_lightning.errors import UserError, one_line


def read_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says. Raises UserError, beginning with `where`, if it is none or has a key twice."""
    try:
        _check_keys(yaml.compose(text, yaml.SafeLoader), where)
        return yaml.safe_load(text)
    except UserError:
        raise
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where} is not YAML: {one_line(error)[:200]}") from error
    except ValueError as error:
        raise UserError(f"{where}: a value is none that YAML can mean ({one_line(error)[:100]}).") from error


def read_yaml_file(path: Path) -> Any:
    """Return what a YAML file says; UserError as `read_yaml`, or if it is not UTF-8."""
    return read_yaml(read_text(path, "--config"), str(path))


def _check_keys(node: yaml.Node | None, where: str) -> None:
    """Raise UserError for a mapping that has a key twice: YAML would keep the last and not say so."""
    waiting, seen = [node], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in keys:
                        raise UserError(
                            f"{where}: key {key.value!r} stands twice, in lines {keys[key.value]} and {line}; remove "
                            "one of them."
                        )
                    keys[key.value] = line
                waiting.append(value)
