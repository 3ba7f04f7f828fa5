"""Forward KL divergence of the token distributions."""

from torch import Tensor

from lfq_lightning.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.ops.linear_soft_ce import linear_soft_ce, logit_mean, logit_moment


@OBJECTIVES.register
class KL(Objective):
    """KL(teacher ‖ student): the LFQ cross-entropy minus the teacher's entropy; same gradient, 0 at a perfect match."""

    paper = "LFQ (arXiv 2605.29756, ICML 2026): CE and KL differ by a constant"
    logit_space = True

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        assert head is not None
        lse, moment = logit_moment(hidden, head.weight)
        return {"moment": moment, "entropy": lse - logit_mean(hidden, head.weight, moment)}

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        return linear_soft_ce(hidden, head.weight, target["moment"]) - target["entropy"]
