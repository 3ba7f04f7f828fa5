"""What `logit_ce` and `kl` share: the shorter way to a soft-target cross-entropy when logits are linear."""

from typing import ClassVar

from torch import Tensor

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.models.head import Head
from lfq_lightning.objectives.divergence_objective import DivergenceObjective
from lfq_lightning.objectives.objective import Rows
from lfq_lightning.ops.linear_soft_ce import covering, linear_soft_ce, log_sum_exp, logit_mean, logit_moment
from lfq_lightning.registry import plugin_name

_HEAD_SHARE = 0.1  # of the vocabulary, where not all of it is covered: 7 % at .99 of stories, 17 % at .999
_LEAST = 2**-23  # probability of the rest: what fp32 tells from 0 beside 1


class SoftTargetObjective(DivergenceObjective):
    """Cross-entropy against the teacher's distribution, its entropy subtracted or not.

    Of the teacher only the logit moment Wᵀp (D numbers a token) is kept; logits never exist as a whole. A soft-capped
    head is not linear: there the teacher's hidden state is kept, and whole rows of logits are compared.

    Args:
        temperature: as in every divergence.
        coverage: below 1, only those tokens of the vocabulary are told apart that hold this share of the teacher's
            probability (mean over calibration); all others count as one, whose logit stays the teacher's. Of the head's
            products a step then needs about a tenth. 1 is the whole vocabulary, which a soft-capped head always gets.
    """

    minus_entropy: ClassVar[bool]

    def __init__(self, *, temperature: float = 1.0, coverage: float = 1.0) -> None:
        super().__init__(temperature=temperature)
        if not 0 < coverage <= 1:
            raise UserError(f"objective {plugin_name(type(self))}: coverage {coverage} must be above 0 and at most 1.")
        self.coverage = coverage
        self.head_share = 1.0 if coverage == 1 else _HEAD_SHARE
        self._weight: Tensor | None = None  # the head's rows (S, D) of tokens that are told apart, if not all are

    def prepare(self, rows: Rows, head: Head | None, ranks: Ranks) -> None:
        assert head is not None
        if self.coverage < 1 and head.softcap is None:
            scaled = (hidden / self.temperature for hidden in rows())
            self._weight = head.weight[covering(scaled, head.weight, self.coverage, ranks.add)]

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        assert head is not None
        if head.softcap is not None:
            return super().target(hidden, head)
        hidden = hidden / self.temperature
        kept: dict[str, Tensor]
        if self._weight is None:
            lse, moment = logit_moment(hidden, head.weight)
            kept = {"moment": moment}
        else:
            lse = log_sum_exp(hidden, head.weight)
            lse_kept, moment = logit_moment(hidden, self._weight)
            share = (lse_kept - lse).exp().clamp(max=1 - _LEAST)
            rest = lse + (-share).log1p()
            kept = {"moment": moment * share[:, None], "rest": rest, "rest_mean": (1 - share) * rest}
        if self.minus_entropy:
            kept["entropy"] = lse - logit_mean(hidden, head.weight, kept["moment"]) - kept.get("rest_mean", 0.0)
        return kept

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        if head.softcap is not None:
            return super().token_loss(hidden, target, head)
        hidden = hidden / self.temperature
        if self._weight is None:
            loss = linear_soft_ce(hidden, head.weight, target["moment"])
        else:
            loss = linear_soft_ce(hidden, self._weight, target["moment"], target["rest"]) - target["rest_mean"]
        if self.minus_entropy:
            loss = loss - target["entropy"]
        return loss * self.temperature**2

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q if self.minus_entropy else -log_q)).sum(-1)
