"""Jensen-Shannon divergence of the token distributions."""

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.objectives import OBJECTIVES, DivergenceObjective


@OBJECTIVES.register
class JS(DivergenceObjective):
    """Generalised Jensen-Shannon divergence: beta·KL(p ‖ m) + (1-beta)·KL(q ‖ m), m = beta·p + (1-beta)·q; bounded.

    Args:
        beta: weight of the teacher p in the mixture, between 0 and 1; 0.5 is the symmetric divergence.
        temperature: both rows of logits are divided by it.
    """

    paper = "Generalised knowledge distillation (arXiv 2306.13649), section 2"

    def __init__(self, *, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__(temperature=temperature)
        if not 0 < beta < 1:
            raise UserError(f"objective js: beta {beta} must lie between 0 and 1.")
        self.beta = beta

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        log_beta, log_rest = torch.tensor([self.beta, 1 - self.beta], dtype=log_p.dtype, device=log_p.device).log()
        log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
        return (self.beta * log_p.exp() * (log_p - log_m) + (1 - self.beta) * log_q.exp() * (log_q - log_m)).sum(-1)
