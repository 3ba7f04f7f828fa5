"""Spent: what a run has taken, over all the processes that have been at it."""

from dataclasses import dataclass


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
