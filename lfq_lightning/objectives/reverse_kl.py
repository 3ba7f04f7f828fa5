"""Reverse KL divergence of the token distributions."""

from torch import Tensor

from lfq_lightning.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.ops.logit_divergence import logit_divergence


@OBJECTIVES.register
class ReverseKL(Objective):
    """KL(student ‖ teacher): mode-seeking; punishes tokens the student likes and the teacher does not."""

    paper = "MiniLLM (arXiv 2306.08543), section 2.1"
    logit_space = True

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        return {"readout": hidden}

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        return logit_divergence(hidden, target["readout"], head.weight, _reverse_kl)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = student.log_softmax(-1)
    return (log_q.exp() * (log_q - teacher.log_softmax(-1))).sum(-1)
