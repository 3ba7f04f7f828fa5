"""Read documents from a text, JSON, CSV or Parquet file, or anything `datasets` loads: a hub name or a folder."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lfq_lightning.data.read_text import mend, parse_json, read_jsonl, read_text
from lfq_lightning.errors import UserError, one_line, said
from lfq_lightning.file_names import user_path
from lfq_lightning.models.chat_template import Message


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template, and the tools that it may describe."""

    messages: list[Message]
    tools: list[Any] | None = None


Document = str | Conversation

_KEY = "data.dataset"
_SEPARATOR = "<|endoftext|>"
_KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")


def check_documents(dataset: str) -> None:
    """Raise UserError if the source is not there; reads none of it. The hub is asked once."""
    path = user_path(dataset, _KEY)
    if path.is_file() or path.is_dir():
        _kind(path)
    elif path.suffix.lower() in _KINDS:
        raise UserError(f"{_KEY}: there is no file {dataset}; give one of {', '.join(_KINDS)}, or a hub name.")
    else:
        _check_hub(dataset)


def read_documents(dataset: str, split: str, subset: str | None) -> Iterator[Document]:
    """Yield documents: text (`<|endoftext|>` separates them in a .txt), or conversations for the chat template.

    Raises UserError if the source cannot be read or has neither a `text` nor a `messages` field.
    """
    path = user_path(dataset, _KEY)
    if not path.is_file():
        yield from _read_hub(dataset, split, subset)
    elif _kind(path) == ".txt":
        texts = read_text(path, _KEY).split(_SEPARATOR)
        yield from (text.strip() for text in texts if text.strip())
    else:
        for place, row in _rows(path):
            yield _document(row, place)


def _kind(path: Path) -> str:
    """Return how a local file is read, by the end of its name; a folder is left to `datasets`."""
    kind = path.suffix.lower()
    if path.is_file() and kind not in _KINDS:
        raise UserError(f"{_KEY}: {path} is of no kind that is read here; give one of {', '.join(_KINDS)}.")
    return kind


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file with the words that name their places."""
    kind = _kind(path)
    if kind == ".jsonl":
        yield from read_jsonl(path, _KEY)
    elif kind == ".json":
        text = read_text(path, _KEY)
        if not text.lstrip().startswith("["):  # one object a line, under the name of an array
            yield from read_jsonl(path, _KEY)
            return
        for number, row in enumerate(parse_json(text, f"{_KEY}: {path}"), start=1):
            yield f"{_KEY}: {path} row {number}", row
    else:
        import datasets

        with said(lambda error: f"{_KEY}: {path} cannot be read ({one_line(error)[:200]}); mend the file."):
            rows = datasets.load_dataset(kind[1:], data_files=glob.escape(str(path)), split="train", streaming=True)
            for number, row in enumerate(rows, start=1):
                yield f"{_KEY}: {path} row {number}", row


def _check_hub(name: str) -> None:
    try:
        snapshot_download(name, repo_type="dataset", allow_patterns=["README.md"])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _unreadable(name, error) from error


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Document]:
    import datasets

    try:
        for row in datasets.load_dataset(name, subset, split=split, streaming=True):
            yield _document(row, f"{_KEY}: {name}")
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UserError:
    reason = one_line(error)[:200]
    return UserError(
        f"{_KEY}: {name!r} cannot be read from the hub ({reason}); check the name, data.split, data.subset and "
        "the network, or use `self_generated`, which needs none."
    )


def _document(row: Any, place: str) -> Document:
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if not row["messages"]:
            raise UserError(f"{place} has no messages; remove the row.")
        return Conversation([_message(message, place) for message in row["messages"]], _tools(row, place))
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return mend(row["text"])
    raise UserError(f"{place} has neither a `text` nor a `messages` field; rename its field.")


def _message(message: Any, place: str) -> Message:
    """Return a message whose content is one text: parts of text are joined."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise UserError(f"{place} has a message without role and content; mend the row.")
    content = message["content"]
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else _part(part, place) for part in content]
        content = "".join(parts)
    if content is not None and not isinstance(content, str):  # None stands beside tool calls
        raise UserError(f"{place} has a message whose content is {type(content).__name__}, not text; mend the row.")
    return {**message, "content": content if content is None else mend(content)}


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise UserError(f"{place} has a message with content that is no text; calibration reads text only.")
    return part["text"]


def _tools(row: dict[str, Any], place: str) -> list[Any] | None:
    """Return the tools that a row describes, as a list or as JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, f"{place}: its `tools`") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{place} has `tools` that are no list; mend the row.")
    return tools or None
