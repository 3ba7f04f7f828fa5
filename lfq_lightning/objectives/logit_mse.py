"""Mean squared error of the logits."""

import torch
from torch import Tensor

from lfq_lightning.models.head import Head
from lfq_lightning.objectives import OBJECTIVES, DivergenceObjective


@OBJECTIVES.register
class LogitMSE(DivergenceObjective):
    """Squared error of the logits, mean over the vocabulary: dᵀ(WᵀW)d / V with d the error of the hidden state.

    The Gram matrix WᵀW (D, D) of the head stands for all logits, which are never made, unless they are soft-capped.
    """

    paper = "the ablation of LFQ (arXiv 2605.29756): head in the path, squared error on logits"

    def __init__(self) -> None:
        super().__init__(temperature=1.0)

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        if head.softcap is not None:
            return super().token_loss(hidden, target, head)
        gram = head.gram
        difference = hidden.to(gram.dtype) - target["readout"].to(gram.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return ((difference @ gram) * difference).sum(-1) / len(head.weight)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean(-1)
