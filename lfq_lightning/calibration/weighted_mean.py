"""WeightedMean: a mean over the tokens of all batches, on all ranks."""

from torch import Tensor

from lfq_lightning.distributed.ranks import Ranks


class WeightedMean:
    """Adds up means over tokens, each weighted by its tokens.

    Args:
        ranks: who has the other batches.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.total = 0.0
        self.count = 0.0

    def add(self, mean: Tensor, mask: Tensor) -> None:
        """Take a scalar, the mean over the tokens where `mask` is True."""
        tokens = int(mask.sum())
        self.total += float(mean) * tokens
        self.count += tokens

    def value(self) -> float:
        """Return the mean; every rank asks for it."""
        total, count = self.ranks.total(self.total, self.count)
        return total / count
