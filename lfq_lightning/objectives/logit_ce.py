"""The LFQ objective: soft-target cross-entropy of the token distributions."""

from torch import Tensor

from lfq_lightning.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.ops.linear_soft_ce import linear_soft_ce, logit_moment


@OBJECTIVES.register
class LogitCE(Objective):
    """LFQ: cross-entropy between the teacher's and the student's token distributions, over the whole vocabulary.

    The teacher is the full-precision model on its own prefix, the student the quantised one on the quantised prefix.
    Of the teacher only the logit moment Wᵀp (D numbers a token) is kept; logits never exist as a whole.
    """

    paper = "LFQ (arXiv 2605.29756, ICML 2026); the loss by the identity of ops/linear_soft_ce"
    logit_space = True

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        assert head is not None
        return {"moment": logit_moment(hidden, head.weight)[1]}

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        return linear_soft_ce(hidden, head.weight, target["moment"])
