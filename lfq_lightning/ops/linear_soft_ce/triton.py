"""logsumexp and logit moment on a GPU: two products by cuBLAS a chunk of the vocabulary, one kernel between them.

The kernel reads a chunk of logits once, keeps the online softmax's running peak and total, and writes probabilities in
the dtype of the second product. README.md beside this file says why the products are cuBLAS's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfq_lightning.ops.triton_launch import launch

CHUNK_VOCABULARY = 2**14  # of the vocabulary at a time: one row of a chunk lies in the registers of a program
_CHUNK_LOGITS = 2**27  # held at once: 512 MB in fp32, 256 MB more as probabilities in 16 bits


@torch.library.custom_op("lfq::logit_moment", mutates_args=())
def logit_moment(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's `logit_moment`: logsumexp(W h) (M,) and Wᵀ softmax(W h) (M, D), fp32.

    Args:
        hidden: (M, D).
        weight: (V, D), the head; fp32 or 16 bits.
    """
    lse = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    moment = torch.zeros(len(hidden), weight.shape[1], dtype=torch.float32, device=hidden.device)
    vocabulary = min(CHUNK_VOCABULARY, len(weight))
    rows = max(1, _CHUNK_LOGITS // vocabulary)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, mixed, out in zip(hidden.split(rows), moment.split(rows), lse.split(rows), strict=True):
            h = part.to(weight.dtype)
            peak = torch.full((len(h),), -torch.inf, dtype=torch.float32, device=h.device)
            total, shrink = torch.zeros_like(peak), torch.empty_like(peak)
            for w in weight.split(vocabulary):
                logits = _product(h, w.T)
                p = torch.empty(logits.shape, dtype=weight.dtype, device=h.device)
                width = triton.next_power_of_2(len(w))
                arguments = (logits, p, peak, total, shrink, len(w))
                launch(soften_kernel, (len(h),), h.device, *arguments, WIDTH=width, num_warps=warps_of(width))
                mixed.mul_(shrink[:, None])
                _add_product(mixed, p, w)
                del logits, p, arguments  # before the next chunk's are made
            out.copy_(peak + total.log())
            mixed.div_(total[:, None])
    return lse, moment


@logit_moment.register_fake
def _(hidden, weight):
    lse = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    return lse, torch.empty(len(hidden), weight.shape[1], dtype=torch.float32, device=hidden.device)


def warps_of(width: int) -> int:
    """Return how many warps hold a row of `width` logits, at most 32 a thread."""
    return max(4, width // 1024)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in fp32, summed in fp32."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total` fp32, in place."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@triton.jit
def soften_kernel(logits, p, peak, total, shrink, vocabulary, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    inside = at < vocabulary
    start = row.to(tl.int64) * vocabulary
    z = tl.load(logits + start + at, mask=inside, other=-float("inf"))
    before = tl.load(peak + row)
    now = tl.maximum(before, tl.max(z, 0))
    e = tl.exp(z - now)
    tl.store(p + start + at, e.to(p.dtype.element_ty), mask=inside)
    less = tl.exp(before - now)
    tl.store(total + row, tl.load(total + row) * less + tl.sum(e, 0))
    tl.store(peak + row, now)
    tl.store(shrink + row, less)
