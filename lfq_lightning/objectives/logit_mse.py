"""Mean squared error of the logits."""

import torch
from torch import Tensor

from lfq_lightning.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective


@OBJECTIVES.register
class LogitMSE(Objective):
    """Squared error of the logits, mean over the vocabulary: dᵀ(WᵀW)d / V with d the error of the hidden state.

    The Gram matrix WᵀW (D, D) of the head stands for all logits, which are never made.
    """

    paper = "the ablation of LFQ (arXiv 2605.29756): head in the path, squared error on logits"
    logit_space = True

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        return {"readout": hidden}

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        gram = head.gram
        difference = hidden.to(gram.dtype) - target["readout"].to(gram.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return ((difference @ gram) * difference).sum(-1) / len(head.weight)
