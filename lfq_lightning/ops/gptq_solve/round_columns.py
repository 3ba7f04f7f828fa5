"""Round columns one by one, each error spread over those to come."""

from functools import partial

import torch
from torch import Tensor

from lfq_lightning.ops.gptq_solve import reference
from lfq_lightning.ops.path import runs_triton


def round_columns(
    work: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    max_code: int,
    codes: Tensor,
    latent: Tensor,
    errors: Tensor,
    book: Tensor | None = None,
) -> None:
    """Write codes, latent and errors (C, O) fp32 of all columns of `work`; `reference.round_span` has the arguments.

    Spans larger than the inner loop takes are halved, and the halves meet in a matrix product. `work` is changed.
    """
    limit, inner_loop = reference.SPAN, reference.round_span
    if book is not None:
        inner_loop = partial(reference.round_span, book=book)
    elif runs_triton(work.device):
        from lfq_lightning.ops.gptq_solve import triton

        limit, inner_loop = triton.SPAN, triton.round_span

    def round_span(low: int, high: int) -> None:
        if high - low > limit:
            middle = (low + high) // 2
            round_span(low, middle)
            work[middle:high].addmm_(factor[low:middle, middle:high].T, errors[low:middle], alpha=-1)
            round_span(middle, high)
            return
        span = slice(low, high)
        grid, results = (scale[span], zero[span], max_code), (codes[span], latent[span], errors[span])
        inner_loop(work[span], factor[span, span], *grid, *results)

    with torch.autocast(work.device.type, enabled=False):
        round_span(0, len(work))
