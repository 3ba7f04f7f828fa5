"""Read documents from a text file, a JSONL file, or anything `datasets` loads: a hub name or a folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lfq_lightning.errors import UserError, one_line

Document = str | list[dict[str, Any]]  # plain text, or the messages of a conversation

_FILES = {".txt", ".jsonl"}
_SEPARATOR = "<|endoftext|>"


def check_documents(dataset: str) -> None:
    """Raise UserError if the source is not there; reads none of it. The hub is asked once."""
    path = Path(dataset).expanduser()
    if path.suffix in _FILES and not path.is_file():
        raise UserError(f"data.dataset: there is no file {dataset}; give a .txt, a .jsonl or a hub name.")
    if path.suffix not in _FILES and not path.is_dir():
        _check_hub(dataset)


def read_documents(dataset: str, split: str, subset: str | None) -> Iterator[Document]:
    """Yield documents: text (`<|endoftext|>` separates them in a .txt), or messages for the chat template.

    Raises UserError if the source cannot be read or has neither a `text` nor a `messages` field.
    """
    path = Path(dataset).expanduser()
    if path.suffix in _FILES:
        return _read_text(path) if path.suffix == ".txt" else _read_jsonl(path)
    return _read_hub(dataset, split, subset)


def _read_text(path: Path) -> Iterator[Document]:
    yield from (document.strip() for document in _decode(path).split(_SEPARATOR) if document.strip())


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_decode(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"data.dataset: {path} line {number} is not JSON ({error}); mend the line.") from error
        yield _document(row, f"{path} line {number}")


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.dataset: {path} is not UTF-8 text ({error.reason}); convert it first.") from error


def _check_hub(name: str) -> None:
    try:
        snapshot_download(name, repo_type="dataset", allow_patterns=["README.md"])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _unreadable(name, error) from error


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Document]:
    import datasets

    try:
        for row in datasets.load_dataset(name, subset, split=split, streaming=True):
            yield _document(row, name)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    reason = one_line(error)[:200]
    return UserError(
        f"data.dataset: {name!r} cannot be read from the hub ({reason}); check the name, data.split, data.subset and "
        "the network, or use `self_generated`, which needs none."
    )


def _document(row: Any, where: str) -> Document:
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        for message in row["messages"]:
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise UserError(f"data.dataset: {where} has a message without role and content; mend the row.")
        return row["messages"]
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    raise UserError(f"data.dataset: {where} has neither a `text` nor a `messages` field; rename its field.")
