"""Saving: when the training of a block is saved, and how a signal ends a run."""

import signal
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import StoppedError, UserError

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Saving:
    """Watches the clock, and signals: SIGTERM, which a job scheduler sends before it kills, Ctrl-C, a closed terminal.

    All ranks agree on every answer.

    Attributes:
        stop_at_once: nothing of the current phase can be saved, so that a signal ends it on the spot.

    Args:
        interval_seconds: how much time may be lost; 0 saves at every step.
    """

    ranks: Ranks

    def __init__(self, interval_seconds: float) -> None:
        if interval_seconds < 0:
            raise UserError(f"save_seconds: {interval_seconds} is negative; give how much time may be lost, or 0.")
        self.interval_seconds = interval_seconds
        self.stop_at_once = True
        self._asked: int | None = None  # the signal that was heard
        self._before: dict[int, Any] = {}
        self.done()

    def listen(self, ranks: Ranks, launcher: Any) -> None:
        """Take the signals from now on, and hand them to the processes that Lightning's launcher has started.

        One that is ignored, as `nohup` wants it of SIGHUP, stays so.
        """
        self.ranks, self._launcher = ranks, launcher
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread hears signals
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            found = signal.signal(number, self._hear)
            self._before.setdefault(number, found)

    def unlisten(self) -> None:
        """Leave the signals to whoever had them before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before, self._asked = {}, None

    def due(self) -> bool:
        """Tell whether the interval is over, by the first rank's clock."""
        late = self.ranks.first and time.monotonic() - self._saved >= self.interval_seconds
        return self.ranks.total(late) != [0]

    def done(self) -> None:
        """Begin the next interval."""
        self._saved = time.monotonic()

    def stopping(self) -> bool:
        """Tell whether any rank was sent a signal."""
        return self.ranks.total(self._asked is not None) != [0]

    def stop(self, where: str) -> NoReturn:
        """End the run. The first rank says so; of the others an exit code would have their launcher kill it."""
        if not self.ranks.first:
            raise SystemExit(0)
        number = self._asked if self._asked is not None else signal.SIGTERM
        raise StoppedError(
            f"stopped by {signal.Signals(number).name} at {where}; run the same command again, without --overwrite, to "
            "resume from there.",
            number,
        )

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._launcher is not None and self._asked is None:
            self._launcher.kill(number)
        again, self._asked = self._asked == number == signal.SIGINT, number
        if self.stop_at_once:
            self.stop("a point with nothing to save")
        if again:
            raise KeyboardInterrupt  # a second Ctrl-C: whoever it is does not want to wait
