"""Seal: JSON that carries a checksum of itself, and a folder that carries those of its files: damage is seen."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lfq_lightning.file_names import CHECKSUMS

_KEY = "sha256"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum added."""
    return {**content, _KEY: _digest(content)}


def unsealed(text: str) -> dict[str, Any]:
    """Return the object that `sealed` was given. Raises ValueError if the text is not what was written."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop(_KEY, None) != _digest(content):
        raise ValueError("it is not what was written: its checksum differs")
    return content


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded_files(folder: Path) -> dict[str, str]:
    """Return what checksums.json records, path in the folder → SHA-256; nothing if there is none, or it is damaged."""
    try:
        return {str(name): str(digest) for name, digest in unsealed((folder / CHECKSUMS).read_text("utf-8")).items()}
    except (OSError, ValueError):
        return {}


def changed_files(folder: Path) -> list[str]:
    """Return which recorded files of a folder are not what was written, or are missing."""
    recorded = recorded_files(folder)
    damaged = [CHECKSUMS] if (folder / CHECKSUMS).is_file() and not recorded else []
    return damaged + [name for name, digest in recorded.items() if not _is(folder / name, digest)]


def _is(file: Path, digest: str) -> bool:
    return file.is_file() and sha256(file) == digest


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
