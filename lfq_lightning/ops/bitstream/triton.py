"""Packing and unpacking of bitstreams on a GPU: a program takes runs of 32 values, which fill whole words."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lfq_lightning.ops.triton_launch import launch

RUNS = 64  # of 32 values, in a program
_WARPS = 4


@torch.library.custom_op("lfq::pack", mutates_args=())
def pack(codes: Tensor, num_bits: int) -> Tensor:
    """The reference's `pack`."""
    rows, columns = codes.shape
    words = torch.empty(rows, triton.cdiv(columns * num_bits, 32), dtype=torch.int32, device=codes.device)
    if words.numel():
        grid = (triton.cdiv(rows * triton.cdiv(columns, 32), RUNS),)
        arguments = (codes.contiguous(), words, rows, columns, words.shape[1])
        launch(pack_kernel, grid, codes.device, *arguments, BITS=num_bits, RUNS=RUNS, num_warps=_WARPS)
    return words


@pack.register_fake
def _(codes, num_bits):
    return codes.new_empty(len(codes), -(-codes.shape[1] * num_bits // 32), dtype=torch.int32)


@torch.library.custom_op("lfq::unpack", mutates_args=())
def unpack(words: Tensor, num_bits: int, columns: int) -> Tensor:
    """The reference's `unpack`."""
    codes = torch.empty(len(words), columns, dtype=torch.uint8, device=words.device)
    if codes.numel():
        grid = (triton.cdiv(len(words) * triton.cdiv(columns, 32), RUNS),)
        arguments = (words.contiguous(), codes, len(words), columns, words.shape[1])
        launch(unpack_kernel, grid, words.device, *arguments, BITS=num_bits, RUNS=RUNS, num_warps=_WARPS)
    return codes


@unpack.register_fake
def _(words, num_bits, columns):
    return words.new_empty(len(words), columns, dtype=torch.uint8)


@triton.jit
def _place(rows, columns, RUNS: tl.constexpr):
    """Return the row (RUNS, 1) of each run, its number in the row, whether it exists, and its values' columns."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)[:, None]
    in_row = (columns + 31) // 32
    row, number = run // in_row, run % in_row
    return row, number, row < rows, number * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def pack_kernel(codes, words, rows, columns, width, BITS: tl.constexpr, RUNS: tl.constexpr):
    row, number, real, column = _place(rows, columns, RUNS)
    code = tl.load(codes + row * columns + column, mask=real & (column < columns), other=0).to(tl.uint32)
    first = tl.arange(0, 32)[None, :] * BITS  # bit of a run at which a value begins
    for word in tl.static_range(BITS):
        up, down = first - 32 * word, 32 * word - first
        begins = (up >= 0) & (up < 32)
        ends = (down > 0) & (down < BITS)  # it began in the word before
        bits = tl.where(begins, code << tl.where(begins, up, 0).to(tl.uint32), 0)
        bits |= tl.where(ends, code >> tl.where(ends, down, 0).to(tl.uint32), 0)
        at = number * BITS + word
        tl.store(words + row * width + at, tl.sum(bits, 1, keep_dims=True).to(tl.int32), mask=real & (at < width))


@triton.jit
def unpack_kernel(words, codes, rows, columns, width, BITS: tl.constexpr, RUNS: tl.constexpr):
    row, number, real, column = _place(rows, columns, RUNS)
    first = tl.arange(0, 32)[None, :] * BITS
    at, shift = number * BITS + first // 32, (first % 32).to(tl.uint32)
    low = tl.load(words + row * width + at, mask=real & (at < width), other=0).to(tl.uint32, bitcast=True)
    beyond = (first % 32 + BITS > 32) & real & (at + 1 < width)
    high = tl.load(words + row * width + at + 1, mask=beyond, other=0).to(tl.uint32, bitcast=True)
    code = (low >> shift) | tl.where(beyond, high << tl.where(beyond, 32 - shift, 0), 0)
    tl.store(codes + row * columns + column, (code & (2**BITS - 1)).to(tl.uint8), mask=real & (column < columns))
