"""Compare two models on the same examples: the mean difference, its interval, and whether it may be chance."""

import math
from dataclasses import dataclass

import torch

_DRAWS = 20_000
_SEED = 0


@dataclass(frozen=True)
class Paired:
    """The difference a - b of two models' values, paired by example.

    Args:
        difference: its mean.
        low: lower end of its 95 % interval.
        high: upper end.
        p: two-sided.
        test: `mcnemar` for values of 0 and 1, else `sign-flip`.
        count: examples.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str
    count: int


def compare(a: list[float], b: list[float]) -> Paired:
    """Compare values of the same examples, in the same order.

    The interval is a percentile bootstrap over examples. p is McNemar's exact test (binomial over the examples where
    the models differ) if all values are 0 or 1, else the share of random sign changes of the differences whose mean is
    as far from 0. Random numbers are fixed, so the same values give the same result.

    Raises ValueError if there are no examples, or unequally many.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired.")
    differences = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    if not differences.isfinite().all():
        return Paired(math.nan, math.nan, math.nan, math.nan, "none: values that are no numbers", len(a))
    generator = torch.Generator().manual_seed(_SEED)
    means = torch.cat([_resampled_means(differences, draws, generator) for draws in _draws(len(a))])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    binary = set(a) | set(b) <= {0.0, 1.0}
    p = mcnemar(a, b) if binary else _sign_flip(differences, generator)
    return Paired(float(differences.mean()), low, high, p, "mcnemar" if binary else "sign-flip", len(a))


def mcnemar(a: list[float], b: list[float]) -> float:
    """Return the two-sided p of McNemar's exact test on values of 0 and 1 (McNemar 1947; exact: binomial at 1/2)."""
    won, lost = (sum(x > y for x, y in pairs) for pairs in (zip(a, b, strict=True), zip(b, a, strict=True)))
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def _draws(count: int) -> list[int]:
    """Split the random draws into parts of bounded memory."""
    each = max(1, 4_000_000 // count)
    return [min(each, _DRAWS - start) for start in range(0, _DRAWS, each)]


def _resampled_means(values: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    return values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)


def _sign_flip(differences: torch.Tensor, generator: torch.Generator) -> float:
    far = 0
    for draws in _draws(len(differences)):
        signs = torch.randint(0, 2, (draws, len(differences)), generator=generator).double() * 2 - 1
        far += int(((signs @ differences).abs() >= differences.sum().abs() * (1 - 1e-12)).sum())
    return (far + 1) / (_DRAWS + 1)
