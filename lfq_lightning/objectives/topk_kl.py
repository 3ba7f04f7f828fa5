"""KL divergence over the teacher's most likely tokens."""

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.objectives import OBJECTIVES, DivergenceObjective


@OBJECTIVES.register
class TopKKL(DivergenceObjective):
    """KL(teacher ‖ student) of the teacher's k most likely tokens and one bucket for all others.

    Args:
        k: tokens told apart; at the vocabulary's size or above it is `kl`.
    """

    paper = "top-k logit distillation, e.g. arXiv 2410.16215, section 3; the bucket keeps it a divergence"

    def __init__(self, *, k: int = 64) -> None:
        super().__init__(temperature=1.0)
        if k < 1:
            raise UserError(f"objective topk_kl: k {k} must be at least 1.")
        self.k = k

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        if self.k >= log_p.shape[-1]:
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        top_p, index = log_p.topk(self.k, -1)
        chosen = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, index, True)
        loss = (top_p.exp() * (top_p - log_q.gather(-1, index))).sum(-1)
        rest_p, rest_q = (log.masked_fill(chosen, -torch.inf).logsumexp(-1) for log in (log_p, log_q))
        return loss + rest_p.exp() * (rest_p - rest_q)
