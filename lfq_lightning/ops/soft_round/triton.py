"""Soft rounding in one kernel forward and one backward; programs are cut as those of `fake_quant`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfq_lightning.ops.fake_quant.triton import WARPS, tile_of
from lfq_lightning.ops.triton_launch import launch
from lfq_lightning.ops.triton_round import clip_to_codes


def soft_round(position: Tensor, scale: Tensor, low: Tensor, zero: Tensor, sharpness: float, max_code: int) -> Tensor:
    """The reference's `soft_round`, in the autocast dtype if autocast is on."""
    device = position.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return _soft_round(position, scale, low, zero, sharpness, max_code, dtype)


@torch.library.custom_op("lfq::soft_round", mutates_args=())
def _soft_round(
    position: Tensor, scale: Tensor, low: Tensor, zero: Tensor, sharpness: float, max_code: int, dtype: torch.dtype
) -> Tensor:
    (o, g, k), out = position.shape, torch.empty(position.shape, dtype=dtype, device=position.device)
    rows, columns = tile_of(k)
    grid = (triton.cdiv(o * g, rows), triton.cdiv(k, columns))
    arguments = (*(t.contiguous() for t in (position, scale, low, zero)), out, o * g, k, sharpness, max_code)
    launch(forward_kernel, grid, position.device, *arguments, ROWS=rows, COLUMNS=columns, num_warps=WARPS)
    return out


@_soft_round.register_fake
def _(position, scale, low, zero, sharpness, max_code, dtype):
    return torch.empty(position.shape, dtype=dtype, device=position.device)


@torch.library.custom_op("lfq::soft_round_backward", mutates_args=())
def _backward(
    grad: Tensor, position: Tensor, scale: Tensor, low: Tensor, zero: Tensor, sharpness: float, max_code: int
) -> tuple[Tensor, Tensor]:
    (o, g, k), by_position, by_scale = position.shape, torch.empty_like(position), torch.empty_like(scale)
    rows, columns = tile_of(k, backward=True)
    arguments = (t.contiguous() for t in (position, scale, low, zero, grad))
    sizes = (o * g, k, sharpness, max_code)
    grid = (triton.cdiv(o * g, rows),)
    launch(
        *(backward_kernel, grid, position.device, *arguments, by_position, by_scale, *sizes),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=WARPS,
    )
    return by_position, by_scale


@_backward.register_fake
def _(grad, position, scale, low, zero, sharpness, max_code):
    return torch.empty_like(position), torch.empty_like(scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sharpness, ctx.max_code, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    by_position, by_scale = _backward(grad, *ctx.saved_tensors, ctx.sharpness, ctx.max_code)
    return by_position, by_scale, None, None, None, None, None


_soft_round.register_autograd(_differentiate, setup_context=_save)


@triton.jit
def forward_kernel(
    position, scale, low, zero, out, R, K, sharpness, max_code, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < R) & (column < K)
    at = row.to(tl.int64) * K + column
    s = tl.load(scale + row, mask=row < R, other=1.0)
    z = tl.load(zero + row, mask=row < R, other=0.0)
    up = tl.sigmoid(tl.load(position + at, mask=inside, other=0.0) * sharpness)
    code = tl.load(low + at, mask=inside, other=0.0) + up
    code = clip_to_codes(code, max_code)
    tl.store(out + at, ((code - z) * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    position, scale, low, zero, grad, by_position, by_scale, R, K, sharpness, max_code,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    s = tl.load(scale + row, mask=row < R, other=1.0)
    z = tl.load(zero + row, mask=row < R, other=0.0)
    total = tl.zeros((ROWS, 1), dtype=tl.float32)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < R) & (column < K)
        at = row.to(tl.int64) * K + column
        up = tl.sigmoid(tl.load(position + at, mask=inside, other=0.0) * sharpness)
        code = tl.load(low + at, mask=inside, other=0.0) + up
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(g * (clip_to_codes(code, max_code) - z), 1, keep_dims=True)
        slope = tl.where((code >= 0.0) & (code <= max_code), up * (1.0 - up), 0.0)
        tl.store(by_position + at, g * slope * s * sharpness, mask=inside)
    tl.store(by_scale + row, total, mask=row < R)
