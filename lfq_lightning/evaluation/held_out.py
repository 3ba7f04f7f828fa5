"""What was lost on held-out tokens: KL, top-1 agreement, flip rate, perplexity, as torchmetrics."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.evaluation.token_profile import TokenProfile
from lfq_lightning.models.head import Head
from lfq_lightning.token_set import NO_NEXT, TokenSet

_ROWS = 32  # of the vocabulary's width worked on at once: three temporaries of a whole sequence are a lot


class TokenMean(Metric, ABC):
    """Mean over tokens of a value that compares the student's and the teacher's log-probabilities."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)  # `evaluate` sums over ranks
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor, next_token: Tensor) -> None:
        """Take log-probabilities (M, V) fp32 and the true next token (M,), NO_NEXT where there is none."""
        values = self.values(student, teacher, next_token)
        self.total += values.float().sum().cpu()  # states stay on the CPU: not every accelerator has fp64
        self.count += len(values)

    def compute(self) -> Tensor:
        return (self.total / self.count).float()

    @abstractmethod
    def values(self, student: Tensor, teacher: Tensor, next_token: Tensor) -> Tensor:
        """Return one value per counted token."""


class KLToTeacher(TokenMean):
    """KL(teacher ‖ student) in nats per token; 0 at a perfect match."""

    def values(self, student: Tensor, teacher: Tensor, next_token: Tensor) -> Tensor:
        parts = zip(student.split(_ROWS), teacher.split(_ROWS), strict=True)
        return torch.cat([(p.exp() * (p - q)).sum(-1) for q, p in parts])


class Top1Agreement(TokenMean):
    """Share of tokens whose most likely next token is the teacher's."""

    def values(self, student: Tensor, teacher: Tensor, next_token: Tensor) -> Tensor:
        return student.argmax(-1) == teacher.argmax(-1)


class FlipRate(TokenMean):
    """Share of tokens where top-1 turns from right to wrong or back, against the text (arXiv 2407.09141, section 3)."""

    def values(self, student: Tensor, teacher: Tensor, next_token: Tensor) -> Tensor:
        known = next_token != NO_NEXT
        right = [(log_p.argmax(-1) == next_token)[known] for log_p in (student, teacher)]
        return right[0] != right[1]


class Perplexity(TokenMean):
    """exp of the student's mean negative log-likelihood of the text."""

    def values(self, student: Tensor, teacher: Tensor, next_token: Tensor) -> Tensor:
        known = next_token != NO_NEXT
        return -student.gather(1, next_token.clamp(min=0)[:, None])[known, 0]

    def compute(self) -> Tensor:
        return super().compute().exp()


class TeacherPerplexity(Perplexity):
    """exp of the teacher's mean negative log-likelihood of the text."""

    def values(self, student: Tensor, teacher: Tensor, next_token: Tensor) -> Tensor:
        return super().values(teacher, teacher, next_token)


def held_out_metrics() -> MetricCollection:
    """Return a fresh set of all metrics under their public names."""
    return MetricCollection(
        {
            "kl": KLToTeacher(),
            "top1_agreement": Top1Agreement(),
            "flip_rate": FlipRate(),
            "perplexity": Perplexity(),
            "perplexity_fp": TeacherPerplexity(),
        },
        compute_groups=False,
    )


def evaluate(
    students: dict[str, Tensor],
    teacher: Tensor,
    head: Head,
    tokens: TokenSet,
    ranks: Ranks,
    profiles: dict[str, TokenProfile] | None = None,
) -> dict[str, tuple[dict[str, float], dict[str, list[float]]]]:
    """Return, by student, the metrics over all held-out tokens and the same per sequence (for paired tests).

    Logits are fp32 and exist for one sequence at a time, the teacher's and one student's.

    Args:
        students: name → (N, T, D), this rank's hidden states, after `head.readout`.
        teacher: (N, T, D), the full-precision model's; may be one of the students too.
        head: in fp32.
        tokens: what the hidden states of all ranks were made from.
        ranks: who has the other sequences.
        profiles: take each sequence of the student of that name too.
    """
    metrics = {name: held_out_metrics() for name in students}
    per_sequence = {name: {str(metric): list[float]() for metric in metrics[name]} for name in students}
    next_token, seq_len = tokens.next_token, tokens.input_ids.shape[1]
    for row, number in enumerate(ranks.share(len(tokens))):
        keep = tokens.mask[number]
        expected = head.logits(teacher[row][keep]).log_softmax(-1)
        following = next_token[number][keep].to(expected.device)
        for name, student in students.items():
            found = expected if student is teacher else head.logits(student[row][keep]).log_softmax(-1)
            for metric, value in metrics[name](found, expected, following).items():
                per_sequence[name][metric].append(float(value))
            if profiles and name in profiles:
                profiles[name].update(found, expected, tokens.input_ids[number][keep], following, seq_len)
    results = {}
    for name, collection in metrics.items():
        for metric in collection.values():
            assert isinstance(metric, TokenMean)
            total, count = ranks.total(float(metric.total), int(metric.count))
            metric.total, metric.count = torch.tensor(total, dtype=torch.float64), torch.tensor(count)
        whole = {metric: ranks.interleave(values) for metric, values in per_sequence[name].items()}
        results[name] = {metric: float(value) for metric, value in collection.compute().items()}, whole
    return results


@torch.no_grad()
def final_metrics(
    streams: dict[str, Tensor], head: Head, tokens: TokenSet, frequency: Tensor, ranks: Ranks
) -> dict[str, Any]:
    """Return what metrics.json says of a run's held-out tokens.

    Args:
        streams: what leaves the last block, (N, T, D) of this rank, of `full_precision`, of the model as it was
            `before_last_training`, and `quantized`.
        head: in fp32.
        tokens: of all ranks.
        frequency: (V,), how often each token occurs in the calibration data.
        ranks: who has the other sequences.
    """
    device = head.weight.device
    heads = dict.fromkeys(streams, head) | {"full_precision": head.teacher()}
    h = {name: heads[name].readout(hidden.float().to(device)) for name, hidden in streams.items()}
    profile = TokenProfile(frequency)
    found = evaluate(h, h["full_precision"], head, tokens, ranks, {"quantized": profile})
    metrics = {name: {"held_out": whole, "per_sequence": each} for name, (whole, each) in found.items()}
    return {"held_out": metrics["quantized"]["held_out"], **metrics, "profile": profile.result(ranks)}
