"""TeacherForced: what a model loses where it and full precision read the same tokens."""

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from lfq_lightning.evaluation.batches import in_batches
from lfq_lightning.evaluation.evaluated_model import EvaluatedModel
from lfq_lightning.evaluation.held_out import TokenMean, held_out_metrics
from lfq_lightning.evaluation.score import Score, standard_error
from lfq_lightning.models.head import Head
from lfq_lightning.token_set import NO_NEXT

_TOKENS_AT_ONCE = 256  # whose logits exist together
_BETTER = {"kl": False, "top1_agreement": True, "flip_rate": False, "perplexity": False}

Totals = dict[str, list[float]]  # metric → its sum over tokens, and their number


@dataclass(frozen=True)
class Reading:
    """Tokens to read at once.

    Args:
        token_ids: T of them.
        spans: first and one past the last token of each stretch whose totals are wanted.
    """

    token_ids: list[int]
    spans: list[tuple[int, int]]


class TeacherForced:
    """Totals of the metrics of `held_out`, kept as they come with each model's answers.

    Args:
        reference: the full-precision model; it is asked first.
        others: whom it will be compared with: it runs only for what one of them has not read yet.
    """

    def __init__(self, reference: EvaluatedModel, others: list[EvaluatedModel]) -> None:
        self._reference, self._others = reference, others
        self._hidden: dict[tuple[int, ...], Tensor] = {}

    def totals(self, name: str, readings: list[Reading], model: EvaluatedModel) -> list[list[Totals]]:
        """Return each reading's totals, by span. `name` is for the progress bar."""
        if model is self._reference:
            everyone = [self._reference, *self._others]
            missing = [r for r in readings if any(self._question(r) not in each.answers for each in everyone)]
            for (reading,), hidden in in_batches(
                f"{name}, full precision", missing, 1, lambda some: model.hidden(some[0].token_ids)
            ):
                self._hidden[tuple(reading.token_ids)] = hidden.cpu()
            if missing and model.kept_head is None:
                model.kept_head = model.head()
        open_ones = [reading for reading in readings if self._question(reading) not in model.answers]
        if open_ones:
            teacher, student = self._reference.kept_head, model.head()
            assert teacher is not None

            def run(some: list[Reading]) -> list[Totals]:
                hidden = self._hidden[tuple(some[0].token_ids)]
                return window_totals((model.hidden(some[0].token_ids), student), (hidden, teacher), some[0])

            for (reading,), totals in in_batches(f"{name}, {model.source}", open_ones, 1, run):
                model.answers.add([self._question(reading)], [totals])
        return [model.answers[self._question(reading)] for reading in readings]

    def _question(self, reading: Reading) -> list[object]:
        return ["read", *astuple(reading), self._reference.digest]


@torch.no_grad()
def window_totals(student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], reading: Reading) -> list[Totals]:
    """Return for each span of a reading each metric's sum over its tokens, and their number.

    Args:
        student: hidden states (T, D) after the final norm, and the head that reads them.
        teacher: the full-precision model's.
        reading: the T tokens that the hidden states were made from.
    """
    following = torch.tensor([*reading.token_ids[1:], NO_NEXT], device=student[0].device)
    found: list[Totals] = []
    for first, end in reading.spans:
        metrics = held_out_metrics()
        for start in range(first, end, _TOKENS_AT_ONCE):
            some = slice(start, min(start + _TOKENS_AT_ONCE, end))
            log_p = [
                head.logits(head.readout(hidden[some].to(following.device).float())).log_softmax(-1)
                for hidden, head in (student, teacher)
            ]
            metrics.update(*log_p, following[some])
        totals: Totals = {}
        for name, metric in metrics.items():
            assert isinstance(metric, TokenMean)
            totals[str(name)] = [float(metric.total), int(metric.count)]
        found.append(totals)
    return found


def combine(totals: list[Totals]) -> dict[str, Score]:
    """Return the metrics over all stretches. Perplexity is exp of a mean, its standard error by the delta method."""
    found: dict[str, Score] = {}
    for name, better in _BETTER.items():
        mean = math.fsum(each[name][0] for each in totals) / sum(each[name][1] for each in totals)
        per_window = [each[name][0] / each[name][1] for each in totals]
        value, stderr, unit = mean, standard_error(per_window), ""
        if name == "perplexity":
            value, stderr, unit = math.exp(mean), math.exp(mean) * stderr, "nats"
        found[name] = Score(value, stderr, per_window, better, unit)
    return found
