"""How a command ends: an error is one sentence on stderr and an exit code, whatever happens."""

import errno
import locale
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from lfq_lightning.errors import UserError, named

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_INTERRUPTED, _UNFORESEEN = 130, 70  # what a shell shows for SIGINT; EX_SOFTWARE of sysexits.h


def run_to_its_end(work: Callable[[], object]) -> None:
    """Do the work of a command; what it raises becomes a sentence and SystemExit."""
    try:
        work()
    except UserError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        _end("interrupted", _INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            where = f"{error.filename}: " if error.filename else ""
            _end(f"{where}{os.strerror(error.errno or 0)}; free some space and run the same command again.", 2)
        _end(f"{named(error, 300)}; nobody foresaw that: {_kept_trace()}", _UNFORESEEN)


def prepare_streams() -> None:
    """Make printing safe: on a terminal that knows few characters, and into a pipe that somebody closes."""
    for stream in (sys.stdout, sys.stderr):
        if "utf" not in (stream.encoding or "").lower():
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    _outlive_reader(sys.stdout)


def use_utf8(arguments: list[str]) -> None:
    """Start this command anew in Python's UTF-8 mode where the system's files are read as something else."""
    if not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower() not in {"utf-8", "utf8"}:
        os.execv(sys.executable, [sys.executable, "-P", "-X", "utf8", "-m", "lfq_lightning", *arguments])


def _outlive_reader(stream: TextIO) -> None:
    """Let what is written after the reader has gone (`lfq run … | head`) go nowhere, in place of an error."""

    def quietly(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(*what: Any) -> Any:
            try:
                return write(*what)
            except BrokenPipeError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                return None

        return written

    stream.write, stream.flush = quietly(stream.write), quietly(stream.flush)  # type: ignore[method-assign]


def _end(sentence: str, code: int) -> None:
    print(f"lfq: error: {sentence}", file=sys.stderr)
    sys.exit(code)


def _kept_trace() -> str:
    """Write the trace of the error at hand to a file, and return what to say of it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lfq-error-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(traceback.format_exc())
    except OSError:
        return "its trace could not be written, for want of space."
    return f"its trace is in {file.name}, please report it."
