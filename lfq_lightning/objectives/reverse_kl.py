"""Reverse KL divergence of the token distributions."""

from torch import Tensor

from lfq_lightning.objectives import OBJECTIVES, DivergenceObjective


@OBJECTIVES.register
class ReverseKL(DivergenceObjective):
    """KL(student ‖ teacher): mode-seeking; punishes tokens the student likes and the teacher does not."""

    paper = "MiniLLM (arXiv 2306.08543), section 2.1"

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q = student.log_softmax(-1)
        return (log_q.exp() * (log_q - teacher.log_softmax(-1))).sum(-1)
