"""A path as a user types it."""

from pathlib import Path

from lfq_lightning.errors import UserError, one_line


def user_path(given: str | Path, where: str) -> Path:
    """Return the path with `~` expanded. Raises UserError, beginning with `where`, for what can be no path here."""
    try:
        path = Path(given).expanduser()
        path.lstat()  # asks the system, which refuses names that are too long, among others
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        shown = str(given) if len(str(given)) <= 60 else f"{str(given)[:57]}…"
        raise UserError(f"{where}: {shown!r} is no path ({one_line(error)[:80]}); give another one.") from error
    return path
