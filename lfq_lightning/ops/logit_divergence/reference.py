"""The general path for losses that need whole rows of logits, in plain PyTorch (any device).

Where no identity helps, both rows of logits are made for a few tokens, the loss and its gradient are taken, and the
logits are dropped before the next few. Three head products a step (the identity of `linear_soft_ce` needs two), and the
teacher's hidden state is kept in place of its moment.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK_LOGITS = 2**22  # of each side held at once

Divergence = Callable[[Tensor, Tensor], Tensor]  # (m, V) student and teacher logits → (m,) losses


class _LogitDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        teacher: Tensor,
        weight: Tensor,
        divergence: Divergence,
        tokens: int,
        softcap: float | None,
    ) -> Tensor:
        sums = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.empty(len(hidden), dtype=sums, device=hidden.device)
        trains = ctx.needs_input_grad[0]
        gradient = torch.empty(hidden.shape if trains else 0, dtype=sums, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), tokens):
                part = slice(start, start + tokens)
                teacher_logits = (teacher[part].to(weight.dtype) @ weight.T).to(sums)
                logits = (hidden[part].to(weight.dtype) @ weight.T).to(sums)
                with torch.set_grad_enabled(trains):
                    logits.requires_grad_(trains)
                    value = divergence(soft_cap(logits, softcap), soft_cap(teacher_logits, softcap))
                loss[part] = value.detach()
                if trains:
                    (slope,) = torch.autograd.grad(value, logits, torch.ones_like(value))
                    gradient[part] = (slope.to(weight.dtype) @ weight).to(sums)
        ctx.save_for_backward(gradient)
        ctx.hidden_dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(ctx.hidden_dtype), None, None, None, None, None


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap·tanh(logits / cap), the bound of Gemma 2 (arXiv 2408.00118, section 2); logits if there is none."""
    return logits if cap is None else (logits / cap).tanh() * cap


def logit_divergence(
    hidden: Tensor,
    teacher: Tensor,
    weight: Tensor,
    divergence: Divergence,
    tokens: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return `divergence` of each token (M,) fp32; differentiable in `hidden`.

    Args:
        hidden: (M, D), the student's, after the final norm.
        teacher: (M, D), the teacher's.
        weight: (V, D), the frozen head; products run in its dtype, all else in fp32 or wider.
        divergence: maps (m, V) student and teacher logits to (m,) losses, differentiable in the student's.
        tokens: rows of logits held at once; the value does not depend on it. By default as many as 4 M logits.
        softcap: bound on the logits, put on them before `divergence`.
    """
    rows = tokens or max(1, _CHUNK_LOGITS // len(weight))
    return _LogitDivergence.apply(hidden, teacher, weight, divergence, rows, softcap)
