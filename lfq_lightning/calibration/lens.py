"""Lens: the KL to full precision of what the head reads after a block (the logit lens), a profile along depth."""

import torch
from torch import Tensor

from lfq_lightning.calibration.activation_cache import ActivationCache
from lfq_lightning.calibration.weighted_mean import WeightedMean
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.models.head import Head
from lfq_lightning.objectives.kl import KL

_TOKENS = 512  # held-out tokens on which it is read: a small model has a large head


class Lens:
    """What full precision predicts after a block on some held-out tokens; exact for the last block only.

    Args:
        held_out: has the teacher's outputs of the block.
        head: the frozen head.
        ranks: each looks at its own sequences.
        device: where products run.
    """

    def __init__(self, held_out: ActivationCache, head: Head, ranks: Ranks, device: torch.device) -> None:
        wanted = range(min(len(held_out), max(1, _TOKENS // held_out.mask.shape[1])))
        self.some = slice(len(ranks.share(len(wanted))))
        self.mask = held_out.mask[self.some]
        self.ranks = ranks
        self.device = device
        self.target = KL().target(self._readout(held_out.teacher, head.teacher()), head) if self.mask.any() else {}

    def kl(self, outputs: Tensor, head: Head) -> float:
        """Return KL(teacher ‖ student), nats per token, of the block's outputs (N, T, D) for the held-out sequences."""
        mean = WeightedMean(self.ranks)
        if self.target:
            mean.add(KL().token_loss(self._readout(outputs, head), self.target, head).mean(), self.mask)
        return mean.value()

    def _readout(self, stream: Tensor, head: Head) -> Tensor:
        return head.readout(stream[self.some].to(self.device)[self.mask.to(self.device)].float())
