"""GPTQ's inner loop on a GPU: a span of columns for all rows in one launch.

Rows of a weight do not see each other, so each program keeps a few of them, over the whole span, in registers and goes
through the columns alone. The span's errors then reach the other columns by one matrix product (lazy batches, section
3.3 of the paper).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfq_lightning.ops.triton_launch import launch
from lfq_lightning.ops.triton_round import clip_to_codes, round_to_grid

SPAN = 128
ROWS = 32
WARPS = 1


@torch.library.custom_op("lfq::gptq_round_span", mutates_args=("codes", "latent", "errors"))
def round_span(
    work: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    max_code: int,
    codes: Tensor,
    latent: Tensor,
    errors: Tensor,
) -> None:
    """The reference's `round_span`, for at most SPAN columns; leaves `work` as it is."""
    columns, rows = work.shape
    assert columns <= SPAN and codes.is_contiguous() and latent.is_contiguous() and errors.is_contiguous()
    launch(
        round_span_kernel,
        (triton.cdiv(rows, ROWS),),
        work.device,
        *(t.contiguous() for t in (work, factor, scale, zero)),
        *(codes, latent, errors, columns, rows, max_code),
        WIDTH=triton.next_power_of_2(columns),
        ROWS=ROWS,
        num_warps=WARPS,
    )


@round_span.register_fake
def _(work, factor, scale, zero, max_code, codes, latent, errors):
    return None


@triton.jit
def round_span_kernel(
    work, factor, scale, zero, codes, latent, errors, columns, rows, max_code, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real = row < rows
    at = column[:, None].to(tl.int64) * rows + row[None, :]
    w = tl.load(work + at, mask=(column[:, None] < columns) & real[None, :], other=0.0)
    for j in range(columns):
        now = tl.cast(j, tl.int64) * rows + row
        one = tl.sum(tl.where(column[:, None] == j, w, 0.0), 0)
        s = tl.load(scale + now, mask=real, other=1.0)
        z = tl.load(zero + now, mask=real, other=0.0)
        code = clip_to_codes(round_to_grid(tl.div_rn(one, s), z), max_code)
        error = tl.div_rn(one - (code - z) * s, tl.load(factor + j * columns + j))
        spread = tl.load(factor + j * columns + column, mask=(column > j) & (column < columns), other=0.0)
        w -= spread[:, None] * error[None, :]
        tl.store(codes + now, code, mask=real)
        tl.store(latent + now, one, mask=real)
        tl.store(errors + now, error, mask=real)
