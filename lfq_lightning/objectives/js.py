"""Jensen-Shannon divergence of the token distributions."""

from functools import partial

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.ops.logit_divergence import logit_divergence


@OBJECTIVES.register
class JS(Objective):
    """Generalised Jensen-Shannon divergence: beta·KL(p ‖ m) + (1-beta)·KL(q ‖ m), m = beta·p + (1-beta)·q; bounded.

    Args:
        beta: weight of the teacher p in the mixture, between 0 and 1; 0.5 is the symmetric divergence.
    """

    paper = "Generalised knowledge distillation (arXiv 2306.13649), section 2"
    logit_space = True

    def __init__(self, *, beta: float = 0.5) -> None:
        super().__init__()
        if not 0 < beta < 1:
            raise UserError(f"objective js: beta {beta} must lie between 0 and 1.")
        self.beta = beta

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        return {"readout": hidden}

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        return logit_divergence(hidden, target["readout"], head.weight, partial(_js, beta=self.beta))


def _js(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=log_p.dtype, device=log_p.device).log()
    log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)
