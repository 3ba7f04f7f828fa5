"""Spent: what a run has taken, over all the processes that have been at it."""

import time
from dataclasses import dataclass

import torch

from lfq_lightning.peak_memory import peak_bytes


@dataclass(frozen=True)
class Spent:
    """Time and memory of a run so far.

    Args:
        seconds: of wall time.
        peak_bytes: the most memory that a process of it held.
    """

    seconds: float = 0.0
    peak_bytes: int = 0

    def most(self, noted: dict[str, float]) -> "Spent":
        """Return this, or what an earlier process has noted later: the most of each."""
        return Spent(max(self.seconds, noted["seconds"]), int(max(self.peak_bytes, noted["peak_bytes"])))


class Meter:
    """Measures this process from now on, on top of what earlier ones have taken for the same run.

    Attributes:
        device: whose memory counts; the host's until a Trainer has chosen one.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._earlier = Spent()
        self._started = time.perf_counter()
        self._peak = 0

    def add(self, noted: dict[str, float]) -> None:
        """Count what an earlier process has noted."""
        self._earlier = self._earlier.most(noted)

    def keep(self, peak: int) -> None:
        """Remember a peak (bytes) that the device forgets when its counter is reset."""
        self._peak = max(self._peak, peak)

    def now(self) -> Spent:
        """Return what the run has taken so far."""
        seconds = self._earlier.seconds + time.perf_counter() - self._started
        return Spent(seconds, max(self._earlier.peak_bytes, self._peak, peak_bytes(self.device)))
