"""Write files whole or not at all: aside, to the disk, then under their name. A full disk is a UserError."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lfq_lightning.errors import UserError, one_line

_ASIDE = ".partial"


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file."""

    def write(aside: Path) -> None:
        aside.touch()
        mode = aside.stat().st_mode
        save_file(tensors, aside, metadata=metadata)
        aside.chmod(mode)  # safetensors lets only the owner read

    _whole(file, write)


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    _whole(file, lambda aside: aside.write_text(text, encoding="utf-8"))


def append_lines(file: Path, lines: list[str]) -> None:
    """Add lines to a text file and bring it to the disk; a process killed meanwhile may leave the last one torn."""
    with writing(file), file.open("a", encoding="utf-8") as open_file:
        open_file.writelines(f"{line}\n" for line in lines)
        open_file.flush()
        os.fsync(open_file.fileno())


def _whole(file: Path, write: Callable[[Path], object]) -> None:
    aside = file.with_name(file.name + _ASIDE)
    try:
        with writing(file):
            write(aside)
            to_disk(aside)
            aside.replace(file)
            to_disk(file.parent)
    except UserError:
        aside.unlink(missing_ok=True)  # a full disk: release what was taken
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing `path` into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({one_line(error)}); free some space and run the same command again, without "
            "--overwrite: it resumes from here."
        ) from error


def to_disk(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
