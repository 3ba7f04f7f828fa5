"""Rows of a CSV in git: made once, added as they come."""

import csv
import fcntl
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def finished(cell: dict[str, str], results: Path) -> bool:
    """Tell whether a CSV has a row with these values."""
    if not results.exists():
        return False
    with results.open(newline="") as file:
        return any(all(row[key] == value for key, value in cell.items()) for row in csv.DictReader(file))


def append(results: Path, row: dict[str, str]) -> None:
    """Add a row to a CSV; other processes may do so too."""
    results.parent.mkdir(exist_ok=True)
    with results.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, list(row))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def code_digest(*folders: str) -> str:
    """Return a digest of the Python sources under folders of the package, by which a row says what it measured."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / "lfq_lightning" / folder).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:8]
