"""The KL to full precision of what the head reads after a block (the logit lens): a profile along depth."""

import torch
from torch import Tensor

from lfq_lightning.activation_cache import ActivationCache
from lfq_lightning.head import Head
from lfq_lightning.objectives.kl import KL
from lfq_lightning.ranks import Ranks
from lfq_lightning.weighted_mean import WeightedMean

_LENS_TOKENS = 1024  # held-out tokens on which it is read


def lens_kl(outputs: Tensor, held_out: ActivationCache, head: Head, ranks: Ranks, device: torch.device) -> float:
    """Return KL(teacher ‖ student), nats per token, on some held-out tokens; exact for the last block only.

    Args:
        outputs: the student's, (N, T, D), of this rank's held-out sequences.
        held_out: has the teacher's outputs of the same block.
    """
    lens = KL()
    wanted = range(min(len(held_out), max(1, _LENS_TOKENS // held_out.mask.shape[1])))
    some = slice(len(ranks.share(len(wanted))))
    mask = held_out.mask[some]
    teacher, student = (
        head.readout(stream[some].to(device)[mask.to(device)].float()) for stream in (held_out.teacher, outputs)
    )
    mean = WeightedMean(ranks)
    if mask.any():
        mean.add(lens.token_loss(student, lens.target(teacher, head), head).mean(), mask)
    return mean.value()
