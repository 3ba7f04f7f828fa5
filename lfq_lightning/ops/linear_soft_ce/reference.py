"""The LFQ loss by an exact identity, in plain PyTorch (any device).

The head is linear and frozen, z = W h. With p = softmax(W h) and the teacher's m = Wᵀ p_fp:

    CE(h) = logsumexp(W h) - m·h,        dCE/dh = Wᵀ p - m

`logit_moment` returns logsumexp and Wᵀ p in one pass over the vocabulary with the online softmax of flash attention
(queries h, keys and values both W): extra memory is one tile of logits, never (tokens, V). The teacher needs one such
pass, ever; the student one per step, which gives the loss and its gradient. A bias is a column of W with a 1 in h.
"""

import torch
from torch import Tensor

_TILE_TOKENS = 1024
_TILE_LOGITS = 2**20  # logits held at once


def logit_moment(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp(W h) (M,) and the logit moment Wᵀ softmax(W h) (M, D), both fp32.

    Args:
        hidden: (M, D), any float dtype; the two products run in the dtype of `weight`, all sums in fp32 or wider.
        weight: (V, D), the head.
    """
    rows = max(1, min(_TILE_TOKENS, len(hidden)))
    words = max(1, _TILE_LOGITS // rows)
    sums = torch.promote_types(weight.dtype, torch.float32)
    lse = torch.empty(len(hidden), dtype=sums, device=hidden.device)
    moment = torch.empty(len(hidden), weight.shape[1], dtype=sums, device=hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), rows):
            h = hidden[start : start + rows].to(weight.dtype)
            peak = torch.full((len(h), 1), -torch.inf, dtype=sums, device=h.device)
            total = torch.zeros_like(peak)
            mixed = torch.zeros(len(h), weight.shape[1], dtype=sums, device=h.device)
            for w in weight.split(words):
                logits = (h @ w.T).to(sums)
                new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
                shrink = (peak - new_peak).exp_()
                p = logits.sub_(new_peak).exp_()
                total.mul_(shrink).add_(p.sum(-1, keepdim=True))
                mixed.mul_(shrink).add_(p.to(weight.dtype) @ w)
                peak = new_peak
            lse[start : start + rows] = (peak + total.log())[:, 0]
            moment[start : start + rows] = mixed / total
    return lse, moment


def logit_mean(hidden: Tensor, weight: Tensor, moment: Tensor) -> Tensor:
    """Return the mean logit Σ_v p_v z_v = m·h (M,) under the distribution whose moment Wᵀp is `moment` (M, D).

    h is rounded as it is in the logits, so that lse - m·h is the cross-entropy of one and the same logits.
    """
    return (moment * hidden.to(weight.dtype)).sum(-1)


class _LinearSoftCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, teacher_moment: Tensor) -> Tensor:
        lse, moment = logit_moment(hidden, weight)
        loss = lse - logit_mean(hidden, weight, teacher_moment)
        ctx.save_for_backward(moment.sub_(teacher_moment))
        ctx.hidden_dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (grad[:, None] * difference).to(ctx.hidden_dtype), None, None


def linear_soft_ce(hidden: Tensor, weight: Tensor, teacher_moment: Tensor) -> Tensor:
    """Return the cross-entropy (M,) fp32 of softmax(W h) against the teacher's distribution; differentiable in h.

    Args:
        hidden: (M, D), after the final norm.
        weight: (V, D), frozen.
        teacher_moment: (M, D) fp32, Wᵀ p_fp from `logit_moment` of the teacher's hidden states.
    """
    return _LinearSoftCE.apply(hidden, weight, teacher_moment)
