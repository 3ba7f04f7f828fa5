"""The pass over the vocabulary that the LFQ loss needs, in plain PyTorch (any device).

One pass gives logsumexp and Wᵀ p with the online softmax of flash attention (queries h, keys and values both W): extra
memory is one tile of logits, never (tokens, V).
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
    return _pass(hidden, weight, moments=True)


def log_sum_exp(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the first of `logit_moment` alone, for half its products."""
    return _pass(hidden, weight, moments=False)[0]


def _pass(hidden: Tensor, weight: Tensor, moments: bool) -> tuple[Tensor, Tensor]:
    rows = max(1, min(_TILE_TOKENS, len(hidden)))
    at_once = max(1, _TILE_LOGITS // rows)
    width = weight.shape[1] if moments else 0
    sums = torch.promote_types(weight.dtype, torch.float32)
    lse = torch.empty(len(hidden), dtype=sums, device=hidden.device)
    moment = torch.empty(len(hidden), width, dtype=sums, device=hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), rows):
            h = hidden[start : start + rows].to(weight.dtype)
            peak = torch.full((len(h), 1), -torch.inf, dtype=sums, device=h.device)
            total = torch.zeros_like(peak)
            mixed = torch.zeros(len(h), width, dtype=sums, device=h.device)
            for w in weight.split(at_once):
                logits = (h @ w.T).to(sums)
                new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
                shrink = (peak - new_peak).exp_()
                p = logits.sub_(new_peak).exp_()
                total.mul_(shrink).add_(p.sum(-1, keepdim=True))
                if moments:
                    mixed.mul_(shrink).add_(p.to(weight.dtype) @ w)
                peak = new_peak
            lse[start : start + rows] = (peak + total.log())[:, 0]
            moment[start : start + rows] = mixed / total
    return lse, moment
