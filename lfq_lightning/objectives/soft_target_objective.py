"""What `logit_ce` and `kl` share: the shorter way to a soft-target cross-entropy when logits are linear."""

from typing import ClassVar

from torch import Tensor

from lfq_lightning.models.head import Head
from lfq_lightning.objectives.divergence_objective import DivergenceObjective
from lfq_lightning.ops.linear_soft_ce import linear_soft_ce, logit_mean, logit_moment


class SoftTargetObjective(DivergenceObjective):
    """Cross-entropy against the teacher's distribution, its entropy subtracted or not.

    Of the teacher only the logit moment Wᵀp (D numbers a token) is kept; logits never exist as a whole. A soft-capped
    head is not linear: there the teacher's hidden state is kept, and whole rows of logits are compared.
    """

    minus_entropy: ClassVar[bool]

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        assert head is not None
        if head.softcap is not None:
            return super().target(hidden, head)
        hidden = hidden / self.temperature
        lse, moment = logit_moment(hidden, head.weight)
        if not self.minus_entropy:
            return {"moment": moment}
        return {"moment": moment, "entropy": lse - logit_mean(hidden, head.weight, moment)}

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        if head.softcap is not None:
            return super().token_loss(hidden, target, head)
        loss = linear_soft_ce(hidden / self.temperature, head.weight, target["moment"])
        if self.minus_entropy:
            loss = loss - target["entropy"]
        return loss * self.temperature**2

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q if self.minus_entropy else -log_q)).sum(-1)
