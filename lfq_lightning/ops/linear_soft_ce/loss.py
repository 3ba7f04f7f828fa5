"""The LFQ loss by an exact identity.

The head is linear and frozen, z = W h. With p = softmax(W h) and the teacher's m = Wᵀ p_fp:

    CE(h) = logsumexp(W h) - m·h,        dCE/dh = Wᵀ p - m

Both come out of one pass over the vocabulary, `logit_moment`. The teacher needs one such pass, ever; the student one
per step, which gives the loss and its gradient. A bias is a column of W with a 1 in h.

Most of the vocabulary has hardly any probability. With only the rows of W that matter, and the others as one token
whose logit r stays the teacher's (the logsumexp of theirs), the loss is log(exp(lse) + exp(r)) - m·h, m from these rows
alone: the cross-entropy of coarser distributions, without a gradient where the student equals the teacher.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lfq_lightning.ops.linear_soft_ce import reference
from lfq_lightning.ops.path import runs_triton

_LOGITS_AT_ONCE = 2**24  # of `covering`


def logit_moment(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp(W h) (M,) and the logit moment Wᵀ softmax(W h) (M, D), both fp32 (fp64 if W is).

    Args:
        hidden: (M, D), any float dtype; the two products run in the dtype of `weight`, all sums in fp32 or wider.
        weight: (V, D), the head.
    """
    if runs_triton(weight.device) and weight.dtype != torch.float64:
        from lfq_lightning.ops.linear_soft_ce import triton

        return triton.logit_moment(hidden.detach(), weight)
    return reference.logit_moment(hidden, weight)


def log_sum_exp(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return logsumexp(W h) (M,) as `logit_moment` does."""
    if runs_triton(weight.device) and weight.dtype != torch.float64:
        return logit_moment(hidden, weight)[0]
    return reference.log_sum_exp(hidden, weight)


def logit_mean(hidden: Tensor, weight: Tensor, moment: Tensor) -> Tensor:
    """Return the mean logit Σ_v p_v z_v = m·h (M,) under the distribution whose moment Wᵀp is `moment` (M, D).

    h is rounded as it is in the logits, so that lse - m·h is the cross-entropy of one and the same logits.
    """
    return (moment * hidden.to(weight.dtype)).sum(-1)


class _LinearSoftCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, teacher_moment: Tensor, rest: Tensor | None) -> Tensor:
        if ctx.needs_input_grad[0]:  # in a held-out check there is no gradient, and half the products do
            lse, moment = logit_moment(hidden, weight)
        else:
            lse, moment = log_sum_exp(hidden, weight), None
        whole = lse if rest is None else torch.logaddexp(lse, rest)
        if moment is not None:
            if rest is not None:
                moment.mul_((lse - whole).exp()[:, None])
            ctx.save_for_backward(moment.sub_(teacher_moment))
            ctx.hidden_dtype = hidden.dtype
        return whole - logit_mean(hidden, weight, teacher_moment)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        return (grad[:, None] * difference).to(ctx.hidden_dtype), None, None, None


def linear_soft_ce(hidden: Tensor, weight: Tensor, teacher_moment: Tensor, rest: Tensor | None = None) -> Tensor:
    """Return the cross-entropy (M,) fp32 of softmax(W h) against the teacher's distribution; differentiable in h.

    Args:
        hidden: (M, D), after the final norm.
        weight: (V, D), frozen.
        teacher_moment: (M, D) fp32, Wᵀ p_fp from `logit_moment` of the teacher's hidden states.
        rest: (M,) fp32, one more logit of each token, which h does not change: logsumexp of the teacher's logits that
            are not in `weight`. Its share of the cross-entropy, p_rest·rest, is left out: a constant.
    """
    return _LinearSoftCE.apply(hidden, weight, teacher_moment, rest)


def covering(
    rows: Iterable[Tensor], weight: Tensor, share: float, add: Callable[[list[Tensor]], None] | None = None
) -> Tensor:
    """Return the fewest tokens of the vocabulary whose mean probability adds up to `share`, rising numbers (S,).

    Args:
        rows: hidden states (M, D) after the final norm; some of them are enough.
        weight: (V, D), the head.
        share: above 0, at most 1.
        add: sums tensors over ranks in place, where each has its own rows.
    """
    total = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    at_once = max(1, _LOGITS_AT_ONCE // len(weight))
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        for hidden in rows:
            for part in hidden.to(weight.dtype).split(at_once):
                total += (part @ weight.T).float().softmax(-1).sum(0)
    if add is not None:
        add([total])
    ordered, tokens = (total / total.sum()).sort(descending=True, stable=True)
    count = int((ordered.cumsum(0) < share).sum()) + 1
    return tokens[:count].sort().values
