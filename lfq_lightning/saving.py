"""Saving: when the training of a block is saved, and how a SIGTERM ends a run."""

import signal
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from lfq_lightning.errors import StoppedError, UserError
from lfq_lightning.ranks import Ranks


class Saving:
    """Watches the clock and SIGTERM, which a job scheduler sends before it kills. All ranks agree on every answer.

    Attributes:
        stop_at_once: nothing of the current phase can be saved, so that SIGTERM ends it on the spot.

    Args:
        interval_seconds: how much time may be lost; 0 saves at every step.
    """

    ranks: Ranks

    def __init__(self, interval_seconds: float) -> None:
        if interval_seconds < 0:
            raise UserError(f"save_seconds: {interval_seconds} is negative; give how much time may be lost, or 0.")
        self.interval_seconds = interval_seconds
        self.stop_at_once = True
        self._asked = False
        self._listens = False
        self._before: Any = signal.SIG_DFL
        self.done()

    def listen(self, ranks: Ranks, launcher: Any) -> None:
        """Take SIGTERM from now on, and hand it to the processes that Lightning's launcher has started, if it has."""
        self.ranks, self._launcher = ranks, launcher
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread hears signals
        found = signal.signal(signal.SIGTERM, self._hear)
        self._before = self._before if self._listens else found
        self._listens = True

    def unlisten(self) -> None:
        """Leave SIGTERM to whoever had it before."""
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)
            self._listens = False

    def due(self) -> bool:
        """Tell whether the interval is over, by the first rank's clock."""
        late = self.ranks.first and time.monotonic() - self._saved >= self.interval_seconds
        return self.ranks.total(late) != [0]

    def done(self) -> None:
        """Begin the next interval."""
        self._saved = time.monotonic()

    def stopping(self) -> bool:
        """Tell whether any rank was sent SIGTERM."""
        return self.ranks.total(self._asked) != [0]

    def stop(self, where: str) -> NoReturn:
        """End the run. The first rank says so; of the others an exit code would have their launcher kill it."""
        if not self.ranks.first:
            raise SystemExit(0)
        raise StoppedError(
            f"stopped by SIGTERM at {where}; run the same command again, without --overwrite, to go on from there."
        )

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._launcher is not None and not self._asked:
            self._launcher.kill(number)
        self._asked = True
        if self.stop_at_once:
            self.stop("a point with nothing to save")
