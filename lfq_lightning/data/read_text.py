"""Read text files as they are: UTF-8, with or without a byte order mark; only a newline ends a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfq_lightning.errors import UserError, one_line


def read_text(path: Path, where: str) -> str:
    """Return a file's text. Raises UserError, beginning with `where`, if it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {path} is not UTF-8 text ({error.reason}); convert it first.") from error
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read ({one_line(error)}); give another file.") from error


def lines_of(text: str) -> list[str]:
    """Return the lines of a text. Unlike `str.splitlines`, U+2028, U+0085 and the like end none."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_jsonl(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    """Yield each row of a JSONL file, with the words that name its place. Raises UserError for what is no JSON."""
    for number, line in enumerate(lines_of(read_text(path, where)), start=1):
        if line.strip():
            place = f"{where}: {path} line {number}"
            yield place, parse_json(line, place)


def parse_json(text: str, place: str) -> Any:
    """Return what a JSON text says. Raises UserError, beginning with `place`, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({one_line(error)[:100]}); mend it.") from error


def mend(text: str) -> str:
    """Return a text in which half a surrogate pair, which no tokenizer takes, is U+FFFD, a whole one its character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
