"""Score: one metric of one model; and Measure, what gives scores."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from lfq_lightning.evaluation.evaluated_model import EvaluatedModel


@dataclass(frozen=True)
class Score:
    """One metric of one model.

    Args:
        value: over all examples.
        stderr: its standard error, NaN for a single example.
        per_example: one value per example, for paired tests; empty for a metric of all examples together.
        higher_is_better: None where neither is.
        unit: of `per_example`, where it is not that of the value: a perplexity is compared in nats.
    """

    value: float
    stderr: float
    per_example: list[float] = field(repr=False)
    higher_is_better: bool | None
    unit: str = ""

    @classmethod
    def mean(cls, values: list[float], higher_is_better: bool | None) -> "Score":
        """Return the mean of some values and its standard error."""
        mean = math.fsum(values) / len(values)
        return cls(mean, standard_error(values), values, higher_is_better)


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


class Measure(ABC):
    """Something to measure models by. The reference is measured first, then the others, one in memory at a time."""

    @abstractmethod
    def begin(self, reference: EvaluatedModel, others: list[EvaluatedModel]) -> None:
        """Make ready. Raises UserError for what cannot be measured; runs no model."""

    @abstractmethod
    def scores(self, model: EvaluatedModel) -> dict[str, dict[str, Score]]:
        """Return part → metric → score of a model; what it has answered before is not asked again."""
