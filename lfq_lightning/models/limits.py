"""Limits on programs that come with a model, chat templates and regular expressions: they may not hang."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lfq_lightning.errors import UserError

_SECONDS = 10.0  # of CPU time; what is usual takes milliseconds
_BYTES = 2**30  # of memory


class _TooLongError(Exception):
    """Raised in the middle of a program by the timer."""


@contextmanager
def limits(what: str, cure: str) -> Iterator[None]:
    """Limit CPU time and memory of what runs inside; where the system can, in the main thread only.

    Raises UserError if it does not end.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    if sys.platform == "linux":  # elsewhere the address space is not limited, or not known
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = held + _BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
    try:
        yield
    except _TooLongError as error:
        raise UserError(f"{what} does not end within {_SECONDS:.0f} s; {cure}.") from error
    except MemoryError as error:
        raise UserError(f"{what} grows without end; {cure}.") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise _TooLongError
