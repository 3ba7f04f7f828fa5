"""WeightedMean: a mean over the tokens of all batches, on all ranks."""

import torch
from torch import Tensor

from lfq_lightning.distributed.ranks import Ranks


class WeightedMean:
    """A mean of means over tokens, each weighted by its tokens; these stay on their device until `value` is asked for.

    Args:
        ranks: who has the other batches.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._means: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def add(self, mean: Tensor, mask: Tensor) -> None:
        """Take a scalar, the mean over the tokens where `mask` is True."""
        self._means.append(mean.detach())
        self._tokens.append(mask.sum())

    def value(self) -> float:
        """Return the mean; every rank asks for it."""
        total, count = 0.0, 0.0
        if self._means:
            means, tokens = (torch.stack(some).tolist() for some in (self._means, self._tokens))
            total, count = sum(m * n for m, n in zip(means, tokens, strict=True)), sum(tokens)
        total, count = self.ranks.total(total, count)
        return total / count
