"""Cross-entropy against the calibration text's next token: an ablation."""

from torch import Tensor

from lfq_lightning.models.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.ops.linear_soft_ce import linear_soft_ce
from lfq_lightning.token_set import NO_NEXT


@OBJECTIVES.register
class HardCE(Objective):
    """Cross-entropy against the text's own next token. Only an ablation: it trains the model on the calibration text.

    This is what AutoRound's `enable_lfq` does, and it harms (intel/auto-round#2007): the teacher is not in the loss.
    Tokens without a next one count as 0.
    """

    paper = "the named ablation of LFQ: hard labels, as in AutoRound's enable_lfq switch"
    logit_space = True
    matches_teacher = False
    linear_head_only = True

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None and head.softcap is None, "the plan checks that"
        label = target["next_token"]
        moment = head.weight[label.clamp(min=0)].float()  # of a one-hot distribution: the word's own row
        return linear_soft_ce(hidden, head.weight, moment) * (label != NO_NEXT)
