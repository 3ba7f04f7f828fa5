"""Quantise-dequantise in one kernel forward and one backward (README.md beside this file has the derivation).

A weight (O, G, K) is R = O·G groups of K; a program takes a few groups, or one, and walks along K.
"""

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfq_lightning.ops.fake_quant.level_terms import LevelTerms
from lfq_lightning.ops.triton_launch import launch
from lfq_lightning.ops.triton_round import clip_to_codes, round_to_grid

_TILE = 2048  # weights a program holds at once; half of it backward, which keeps more numbers of each
WARPS = 4


def fake_quantize(terms: LevelTerms, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """The reference's `fake_quantize(level_tensor(terms, scale), …)`, in the autocast dtype if autocast is on."""
    device = scale.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return _fake_quant(*_arguments(terms, scale, zero), max_code, dtype)


def codes(terms: LevelTerms, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Return the codes of what `fake_quantize` returns, uint8 (O, G, K), by the same arithmetic."""
    return _fake_quant(*_arguments(terms, scale, zero), max_code, torch.uint8)


def _arguments(t: LevelTerms, scale: Tensor, zero: Tensor) -> tuple[Tensor | None, ...]:
    return t.latent, scale, zero, t.log_divisor, t.row_log_divisor, t.offset, t.shift, t.unit


@torch.library.custom_op("lfq::fake_quant", mutates_args=())
def _fake_quant(
    latent: Tensor,
    scale: Tensor,
    zero: Tensor,
    log_divisor: Optional[Tensor],  # noqa: UP045  torch.library reads the annotation
    row_log_divisor: Optional[Tensor],  # noqa: UP045
    offset: Optional[Tensor],  # noqa: UP045
    shift: Optional[Tensor],  # noqa: UP045
    unit: Optional[Tensor],  # noqa: UP045
    max_code: int,
    dtype: torch.dtype,
) -> Tensor:
    (o, g, k), out = latent.shape, torch.empty(latent.shape, dtype=dtype, device=latent.device)
    rows, columns = tile_of(k)
    arguments = [_contiguous(t) for t in (latent, scale, zero, log_divisor, row_log_divisor, offset, shift, unit)]
    grid = (triton.cdiv(o * g, rows), triton.cdiv(k, columns))
    flags = _flags(log_divisor, offset, shift) | {"CODES": dtype == torch.uint8}
    sizes = (o * g, k, g, max_code)
    tile = {"ROWS": rows, "COLUMNS": columns}
    launch(forward_kernel, grid, latent.device, *arguments, out, *sizes, **flags, **tile, num_warps=WARPS)
    return out


@_fake_quant.register_fake
def _(latent, scale, zero, log_divisor, row_log_divisor, offset, shift, unit, max_code, dtype):
    return torch.empty(latent.shape, dtype=dtype, device=latent.device)


@torch.library.custom_op("lfq::fake_quant_backward", mutates_args=())
def _backward(
    grad: Tensor,
    latent: Tensor,
    scale: Tensor,
    zero: Tensor,
    log_divisor: Optional[Tensor],  # noqa: UP045
    row_log_divisor: Optional[Tensor],  # noqa: UP045
    offset: Optional[Tensor],  # noqa: UP045
    shift: Optional[Tensor],  # noqa: UP045
    unit: Optional[Tensor],  # noqa: UP045
    max_code: int,
) -> list[Tensor]:
    """Return the gradients of scale, zero, the logs of each group, log_divisor, offset and shift; empty if absent."""
    (o, g, k), (rows, columns) = latent.shape, tile_of(latent.shape[2], backward=True)
    arguments = [_contiguous(t) for t in (latent, scale, zero, log_divisor, row_log_divisor, offset, shift, unit)]
    by_scale, by_zero, by_group, *whole = _gradients(latent, scale, log_divisor, offset, shift)
    launch(
        backward_kernel,
        (triton.cdiv(o * g, rows),),
        latent.device,
        *arguments,
        grad.contiguous(),
        *(by_scale, by_zero, by_group, *whole),
        *(o * g, k, g, max_code),
        **_flags(log_divisor, offset, shift),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=WARPS,
    )
    return [by_scale, by_zero, by_group, *whole]


@_backward.register_fake
def _(grad, latent, scale, zero, log_divisor, row_log_divisor, offset, shift, unit, max_code):
    return _gradients(latent, scale, log_divisor, offset, shift)


def _gradients(
    latent: Tensor, scale: Tensor, log_divisor: Tensor | None, offset: Tensor | None, shift: Tensor | None
) -> list[Tensor]:
    whole = (latent.new_empty(0) if t is None else torch.empty_like(latent) for t in (log_divisor, offset, shift))
    return [*(torch.empty_like(scale) for _ in range(3)), *whole]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, max_code, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.max_code = max_code


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, _, _, log_divisor, _, offset, shift, _ = saved = ctx.saved_tensors
    by_scale, by_zero, by_group, by_log, by_offset, by_shift = _backward(grad, *saved, ctx.max_code)
    has_log = log_divisor is not None
    return (
        None,
        by_scale,
        by_zero,
        by_log if has_log else None,
        by_group.sum(1, keepdim=True) if has_log else None,
        None if offset is None else by_offset,
        None if shift is None else by_shift,
        *(None, None, None),
    )


_fake_quant.register_autograd(_differentiate, setup_context=_save)


def tile_of(k: int, backward: bool = False) -> tuple[int, int]:
    """Return how many groups of `k` and how many of their columns a program holds, both powers of 2."""
    tile = _TILE // 2 if backward else _TILE
    columns = min(triton.next_power_of_2(k), tile)
    return tile // columns, columns


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _flags(log_divisor: Tensor | None, offset: Tensor | None, shift: Tensor | None) -> dict[str, bool]:
    return {"DIVIDES": log_divisor is not None, "OFFSETS": offset is not None, "SHIFTS": shift is not None}


@triton.jit
def _of_group(scale, zero, row_log_divisor, unit, row, real, G, DIVIDES: tl.constexpr, SHIFTS: tl.constexpr):
    """Return scale, zero point, log divisor of the row and unit (ROWS, 1) of each group; 0 for what is absent."""
    row_log, u = 0.0, 0.0
    if DIVIDES:
        row_log = tl.load(row_log_divisor + row // G, mask=real, other=0.0)
    if SHIFTS:
        u = tl.load(unit + row, mask=real, other=0.0)
    return tl.load(scale + row, mask=real, other=1.0), tl.load(zero + row, mask=real, other=0.0), row_log, u


@triton.jit
def _scaled(latent, log_divisor, shift, at, inside, s, row_log, u, DIVIDES: tl.constexpr, SHIFTS: tl.constexpr):
    """Return the levels without the offset: what is inversely proportional to the scale."""
    w = tl.load(latent + at, mask=inside, other=0.0)
    if DIVIDES:
        w = w * tl.exp(-(tl.load(log_divisor + at, mask=inside, other=0.0) + row_log))
    levels = tl.div_rn(w, s)
    if SHIFTS:
        levels += tl.load(shift + at, mask=inside, other=0.0) * tl.div_rn(u, s)
    return levels


@triton.jit
def forward_kernel(
    latent, scale, zero, log_divisor, row_log_divisor, offset, shift, unit, out, R, K, G, max_code,
    DIVIDES: tl.constexpr, OFFSETS: tl.constexpr, SHIFTS: tl.constexpr, CODES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = row < R
    inside = real & (column < K)
    at = row.to(tl.int64) * K + column
    s, z, row_log, u = _of_group(scale, zero, row_log_divisor, unit, row, real, G, DIVIDES, SHIFTS)
    levels = _scaled(latent, log_divisor, shift, at, inside, s, row_log, u, DIVIDES, SHIFTS)
    if OFFSETS:
        levels += tl.minimum(tl.maximum(tl.load(offset + at, mask=inside, other=0.0), -0.5), 0.5)
    code = clip_to_codes(round_to_grid(levels, z), max_code)
    value = code if CODES else (code - z) * s
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    latent, scale, zero, log_divisor, row_log_divisor, offset, shift, unit, grad,
    by_scale, by_zero, by_group, by_log, by_offset, by_shift, R, K, G, max_code,
    DIVIDES: tl.constexpr, OFFSETS: tl.constexpr, SHIFTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < R
    s, z, row_log, u = _of_group(scale, zero, row_log_divisor, unit, row, real, G, DIVIDES, SHIFTS)
    steps_sum = tl.zeros((ROWS, 1), dtype=tl.float32)
    clipped_sum = tl.zeros((ROWS, 1), dtype=tl.float32)
    log_sum = tl.zeros((ROWS, 1), dtype=tl.float32)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = real & (column < K)
        at = row.to(tl.int64) * K + column
        scaled = _scaled(latent, log_divisor, shift, at, inside, s, row_log, u, DIVIDES, SHIFTS)
        levels = scaled
        if OFFSETS:
            raw = tl.load(offset + at, mask=inside, other=0.0)
            levels += tl.minimum(tl.maximum(raw, -0.5), 0.5)
        code = round_to_grid(levels, z)
        held = (code >= 0.0) & (code <= max_code)
        step = clip_to_codes(code, max_code) - z
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        through = tl.where(held, g * s, 0.0)
        steps_sum += tl.sum(g * step, 1, keep_dims=True)
        clipped_sum += tl.sum(tl.where(held, 0.0, -(g * s)), 1, keep_dims=True)
        log = -(through * scaled)
        log_sum += tl.sum(log, 1, keep_dims=True)
        if DIVIDES:
            tl.store(by_log + at, log, mask=inside)
        if OFFSETS:
            tl.store(by_offset + at, tl.where((raw >= -0.5) & (raw <= 0.5), through, 0.0), mask=inside)
        if SHIFTS:
            tl.store(by_shift + at, through * tl.div_rn(u, s), mask=inside)
    tl.store(by_scale + row, steps_sum + tl.div_rn(log_sum, s), mask=real)
    tl.store(by_zero + row, clipped_sum, mask=real)
    tl.store(by_group + row, log_sum, mask=real)
