"""y = x Ŵᵀ on a GPU for 2, 3, 4 and 8 bits: integers become halves in registers, products run on tensor cores.

Layout (README.md beside this file has the reasons). Along the inputs a weight is cut into tiles, a tile into slices of
2C inputs that lie in one group. A 32-bit word c of an output holds, in its lower and its upper half, the codes of the
two neighbours 2c and 2c + 1 of each slice, so one `and` and one `or` make two floating-point numbers, next to each
other as a tensor core wants them. Three bits are a plane of two and a plane of one: as dense as the checkpoint.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lfq_lightning.grids import IntegerGrid
from lfq_lightning.ops.triton_launch import launch
from lfq_lightning.quantized_tensor import QuantizedTensor

WIDTHS = (2, 3, 4, 8)
_WORDS = {2: (32, 16), 3: (64, 32, 16), 4: (32, 16), 8: (32, 16)}  # C, best first; a tile is 64 … 2048 inputs
_LEAST_GROUP = 32
_DTYPES = (torch.float16, torch.bfloat16)
_MOST_SHARED = 4096  # blocks of an output that programs may share; with more there are enough for all


@dataclass(frozen=True)
class TiledWeight:
    """A weight (O, I) as the kernel reads it; inputs are padded to whole tiles.

    Args:
        words: int32 (tiles, parts, O, C).
        grid: int32 (G, O): the scale in the lower half, the zero point, in the same dtype, in the upper one.
        arrivals: int32, zeros between two products: how many programs have left their part of a block's sum. So the
            products of one weight follow each other; two streams need a copy each.
        dtype: of these two halves.
        bits: of a code.
        group_size: inputs K a scale is shared by.
    """

    words: Tensor
    grid: Tensor
    arrivals: Tensor
    dtype: torch.dtype
    bits: int
    group_size: int


def fits(quantized: QuantizedTensor) -> bool:
    """Tell whether the kernel can hold this weight; if not it is dequantised."""
    group = quantized.scheme.group_of(quantized.codes.shape[1])
    return (
        isinstance(quantized.scheme, IntegerGrid)
        and quantized.scheme.num_bits in WIDTHS
        and quantized.scale.dtype in _DTYPES
        and (group % _LEAST_GROUP == 0 or quantized.scale.shape[1] == 1)
    )


def tile(quantized: QuantizedTensor) -> TiledWeight:
    """Repack a weight that `fits`, on its own device."""
    (o, i), bits = quantized.codes.shape, quantized.scheme.num_bits
    words = words_per_tile(bits, quantized.scheme.group_of(i), i, quantized.scale.shape[1])
    slices, dtype = _slices(bits), quantized.scale.dtype
    length = 2 * words * slices
    # (tiles, O, slices, C, 2): word c of a slice holds its inputs 2c and 2c + 1
    codes = F.pad(quantized.codes, (0, -i % length)).view(o, -1, slices, words, 2).transpose(0, 1).int()
    fields = torch.arange(16 // (2 if bits == 3 else bits), device=codes.device)
    if bits == 3:
        high = fields // 2 * 4 + fields % 2  # the third bits of two words share nibbles
        low, (first, second) = codes & 3, (codes >> 2).chunk(2, 2)
        parts = [*(_fill(part, 2 * fields) for part in low.chunk(2, 2)), _fill(first, high + 2) | _fill(second, high)]
    else:
        parts = [_fill(codes, bits * fields)]
    scale, zero = (t[:, :, 0].T.to(dtype) for t in (quantized.scale, quantized.zero_point))
    grid = torch.stack((scale, zero), -1).view(torch.int32)[:, :, 0]
    arrivals = torch.zeros(_MOST_SHARED, dtype=torch.int32, device=codes.device)
    return TiledWeight(torch.stack(parts, 1), grid, arrivals, dtype, bits, quantized.scheme.group_of(i))


def words_per_tile(bits: int, group_size: int, in_features: int, groups: int) -> int:
    """Return C: the largest that keeps a slice within a group and wastes little of the last tile."""
    for words in _WORDS[bits]:
        wasted = -in_features % (2 * words * _slices(bits))
        if (groups == 1 or group_size % (2 * words) == 0) and wasted * 32 <= in_features:
            return words
    return _WORDS[bits][-1]


def _slices(bits: int) -> int:
    return 16 if bits == 3 else 16 // bits


def _fill(codes: Tensor, places: Tensor) -> Tensor:
    """Return int32 (tiles, O, C): the codes of slice f from bit places[f] on, its second ones 16 bits higher."""
    shift = places[:, None, None] + torch.tensor([0, 16], device=codes.device)
    return (codes.long() << shift).sum((2, 4)).to(torch.int32)  # bits do not overlap; the sum wraps into the sign


def matmul(x: Tensor, weight: TiledWeight) -> Tensor:
    """Return x Ŵᵀ, (M, O) in the dtype of x (M, I).

    Computed in the dtype of the scales, summed in fp32, in a fixed order.
    """
    dtype, x = x.dtype, x.to(weight.dtype)
    # an operator's wrappers take longer than the product of one row; only the compiler and autograd need them
    wrapped = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    multiply = _packed_matmul if wrapped else _multiply
    count = _multiprocessors(x.device)
    return multiply(x, weight.words, weight.grid, weight.arrivals, weight.bits, weight.group_size, count).to(dtype)


def _multiply(
    x: Tensor,
    words: Tensor,
    grid: Tensor,
    arrivals: Tensor,
    bits: int,
    group_size: int,
    multiprocessors: int,
) -> Tensor:
    (m, k), (tiles, _, n, c) = x.shape, words.shape
    block = block_of(m, bits, _has_much_shared_memory(x.device))
    blocks = triton.cdiv(n, block.outputs) * triton.cdiv(m, block.rows)
    shared = block.resident > 0 and blocks <= len(arrivals)
    programs = min(block.resident * multiprocessors, blocks * tiles) if shared else blocks
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    parts = torch.empty(2 * programs * shared, block.rows, block.outputs, dtype=torch.float32, device=x.device)
    length = 2 * c * _slices(bits)
    if m:
        launch(
            block.kernel,
            (programs,),
            x.device,
            *(x.contiguous(), words, grid, out, parts, arrivals),
            *(m, n, k, len(grid), tiles, _table(x.dtype, x.device)),
            **constants(bits, c, group_size, k % length == 0, x.dtype, block, x.is_cuda),
            num_warps=block.warps,
            num_stages=block.stages,
        )
    return out


_packed_matmul = torch.library.custom_op("lfq::packed_matmul", _multiply, mutates_args=())


@_packed_matmul.register_fake
def _(x, words, grid, arrivals, bits, group_size, multiprocessors):
    return x.new_empty(len(x), words.shape[2])


@dataclass(frozen=True)
class Block:
    """What a program computes, and how it is compiled."""

    kernel: Any
    rows: int
    outputs: int
    words: int  # of a slice at a time, at most
    warps: int
    stages: int
    resident: int  # programs of a multiprocessor that run at once and share all blocks; 0: one program a block


# by (rows, bits): outputs, words, warps, stages, programs of a multiprocessor; up to 16 rows as measured on an H100
_FEW = {
    (8, 2): (32, 32, 1, 3, 8),
    (8, 3): (64, 32, 2, 3, 4),
    (8, 4): (64, 32, 2, 3, 4),
    (8, 8): (128, 32, 4, 3, 3),
    (16, 2): (128, 32, 4, 3, 2),
    (16, 3): (64, 32, 2, 2, 4),
    (16, 4): (64, 32, 2, 3, 4),
    (16, 8): (128, 32, 4, 3, 2),
    (32, 2): (64, 32, 4, 3, 4),
    (32, 3): (64, 32, 4, 2, 4),
    (32, 4): (64, 32, 4, 3, 4),
    (32, 8): (64, 32, 4, 3, 4),
}


def block_of(m: int, bits: int, large: bool) -> Block:
    """Return what computes the product of m rows; `large` says that a program may take 200 KB of shared memory."""
    for rows in (8, 16, 32):
        if m <= rows:
            outputs, words, warps, stages, resident = _FEW[rows, bits]
            return Block(few_rows_kernel, rows, outputs, words, warps, stages, resident)
    rows = 64 if m <= 64 else 256 if large and m > 128 else 128
    return Block(many_rows_kernel, rows, 128, 32, 8, 3 if large else 2, 1 if rows == 256 else 2)


def constants(
    bits: int,
    words: int,
    group_size: int,
    even: bool,
    dtype: torch.dtype,
    block: Block,
    assembly: bool,
) -> dict[str, int | bool]:
    """Return the kernel's compile-time arguments."""
    return {
        "BITS": bits,
        "WORDS": words,
        "STEP": min(words, block.words),
        "GROUP": group_size,
        "EVEN": even,
        "BRAIN": dtype == torch.bfloat16,
        "ROWS": block.rows,
        "OUTPUTS": block.outputs,
        "ASSEMBLY": assembly,
    }


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers that the kernels read instead of knowing them: two floats side by side, then 0 … 15.

    The floats are 1024, or 128 in bfloat16: their last 10 or 7 bits take a code. As a constant they would be moved to a
    register before each use, and as an argument they would keep the compiler from choosing the tensor core's layout for
    all that is done to a word; a loaded tensor does neither.
    """
    both = (0x4300 if dtype == torch.bfloat16 else 0x6400) * 0x10001
    return torch.tensor([both, *range(16)], dtype=torch.int32, device=device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _has_much_shared_memory(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= 200 * 1024  # type: ignore[attr-defined]  # not in the stubs


@triton.jit
def _halves(pairs, BRAIN: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Read int32 (O, C) as two 16-bit floats each: (O, 2C).

    With ASSEMBLY the compiler sees that two neighbours already share a register.
    """
    if ASSEMBLY and BRAIN:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
    elif ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        low, high = _as_float(pairs, BRAIN), _as_float(pairs >> 16, BRAIN)
    return tl.join(low, high).reshape(pairs.shape[0], 2 * pairs.shape[1])


@triton.jit
def _as_float(value, BRAIN: tl.constexpr):
    """Read the lower half of an int32 as a float."""
    half = value.to(tl.int16)
    return half.to(tl.bfloat16, bitcast=True) if BRAIN else half.to(tl.float16, bitcast=True)


@triton.jit
def _select(low, high, ASSEMBLY: tl.constexpr):
    """Return the first two bits of each nibble from `low`, the others from `high`.

    With ASSEMBLY the compiler cannot draw a later shift into both, which it would to its own loss.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x33333333, 0xE4;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    return low & 0x33333333 | high & ~0x33333333


@triton.jit
def _steps(word, z, magic, BITS: tl.constexpr, PLACE: tl.constexpr, BRAIN: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return (code - zero point)·2^PLACE, (O, 2C) in 16 bits, exactly.

    Args:
        word: the codes from bit PLACE of each half on.
        z: zero points (O,).
    """
    BASE: tl.constexpr = 128.0 if BRAIN else 1024.0
    if BITS == 8 and BRAIN:  # bfloat16 has 7 bits to put a code into
        upper = _halves((word >> 4) & 0x000F000F | magic[:, None], BRAIN, ASSEMBLY) - BASE
        lower = _halves(word & 0x000F000F | magic[:, None], BRAIN, ASSEMBLY) - BASE
        return upper * 16.0 + lower - z[:, None]
    pairs = word & ((2**BITS - 1 << PLACE) * 65537) ^ magic[:, None]
    return _halves(pairs, BRAIN, ASSEMBLY) - (z * 2.0**PLACE + BASE)[:, None]


@triton.jit
def _grid(grid, k, near, N, G, GROUP: tl.constexpr, BRAIN: tl.constexpr):
    """Return scale and zero point (O,) of the group that holds input k; padded inputs belong to the last one."""
    both = tl.load(grid + tl.minimum(k // GROUP, G - 1).to(tl.int64) * N + near)
    return _as_float(both, BRAIN), _as_float(both >> 16, BRAIN)


@triton.jit
def _share(tiles, M, N, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Return how many units, tiles of a block, there are, and where this program's begin and end.

    All programs get as many, or one more.
    """
    units = tl.cdiv(N, OUTPUTS) * tl.cdiv(M, ROWS) * tiles
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    return units, (program * units // programs).to(tl.int32), ((program + 1) * units // programs).to(tl.int32)


@triton.jit
def _program_of(unit, units):
    """Return the program whose share holds the unit."""
    return (((unit + 1).to(tl.int64) * tl.num_programs(0) - 1) // units).to(tl.int32)


@triton.jit
def _place(words, block, M, N, WORDS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Return the block's outputs and rows, outputs that exist, where their words begin, and a part's length."""
    row_blocks = tl.cdiv(M, ROWS)
    n = block // row_blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    m = block % row_blocks * ROWS + tl.arange(0, ROWS)
    near = tl.minimum(n, N - 1)
    at = words + near.to(tl.int64)[:, None] * WORDS + tl.arange(0, STEP)[None, :]
    return n, m, near, at, tl.cast(N, tl.int64) * WORDS


@triton.jit
def _inputs(x, k, m, M, K, STEP: tl.constexpr, EVEN: tl.constexpr):
    """Return inputs k … k + 2·STEP of the rows, (2·STEP, ROWS); 0 past the end."""
    column = k + tl.arange(0, 2 * STEP)[:, None]
    inside = m[None, :] < M
    if not EVEN:
        inside = inside & (column < K)
    return tl.load(x + m.to(tl.int64)[None, :] * K + column, mask=inside, other=0.0)


@triton.jit
def _write(
    out, parts, arrivals, total, block, tiles, units, whole, n, m, M, N, ROWS: tl.constexpr, OUTPUTS: tl.constexpr
):  # fmt: skip
    """Store a block (OUTPUTS, ROWS) in (M, N); if programs share it, the last to arrive sums their parts, in order."""
    place = m[None, :].to(tl.int64) * N + n[:, None]
    inside = (m[None, :] < M) & (n[:, None] < N)
    if whole:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
    else:
        head, tail = _program_of(block * tiles, units), _program_of(block * tiles + tiles - 1, units)
        # a program leaves two parts at most: of the block it begins with, and of the one it is the first in
        part = parts + tl.arange(0, ROWS)[None, :] * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
        tl.store(part + (2 * tl.program_id(0) + (tl.program_id(0) == head)) * (ROWS * OUTPUTS), total)
        tl.debug_barrier()  # all threads have stored before one says so
        if tl.atomic_add(arrivals + block, 1, sem="acq_rel") == tail - head:
            sum = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
            for program in range(head, tail + 1):
                sum += tl.load(part + (2 * program + (program == head)) * (ROWS * OUTPUTS), cache_modifier=".cg")
            tl.store(out + place, sum.to(out.dtype.element_ty), mask=inside)
            tl.store(arrivals + block, 0)


@triton.jit(do_not_specialize=["G", "tiles"])
def few_rows_kernel(
    x, words, grid, out, parts, arrivals, M, N, K, G, tiles, table,
    BITS: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BRAIN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """A word is taken apart in registers, all its slices in one step; scales multiply the sums of a slice.

    As many codes of a half as the float's free bits hold are used where they stand, as multiples of a power of 2 that
    the scale takes back; then the word is shifted.
    """
    PARTS: tl.constexpr = 3 if BITS == 3 else 1
    MAINS: tl.constexpr = 2 if BITS == 3 else 1  # words of the main plane for one of the high bits' plane
    FIELDS: tl.constexpr = 8 if BITS == 3 else 16 // BITS
    KINDS: tl.constexpr = 2 if BITS == 3 else 1  # of slices: even ones and odd ones
    PITCH: tl.constexpr = 4 if BITS == 3 else BITS
    FIT: tl.constexpr = max(1, ((7 if BRAIN else 10) + PITCH - BITS) // PITCH)  # codes in a float's last bits
    SLICE: tl.constexpr = 2 * WORDS
    STEPS: tl.constexpr = WORDS // STEP  # in which a slice is gone through
    units, begin, end = _share(tiles, M, N, ROWS, OUTPUTS)
    for block in range(begin // tiles, (end - 1) // tiles + 1):
        n, m, near, at, step = _place(words, block, M, N, WORDS, STEP, ROWS, OUTPUTS)
        total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
        base = tl.load(table + near * 0)
        first, last = tl.maximum(begin - block * tiles, 0), tl.minimum(end - block * tiles, tiles)
        for i in range(first * MAINS * STEPS, last * MAINS * STEPS):
            part, skipped = i // STEPS % MAINS, i % STEPS * STEP
            here = at + tl.cast(i // (STEPS * MAINS), tl.int64) * PARTS * step + skipped
            word = tl.load(here + part * step)
            odd = word
            if BITS == 3:  # codes of even and of odd slices, a nibble each
                high = tl.load(here + 2 * step) << tl.load(table + 1 + 2 * part + near * 0)[:, None]
                odd = _select(word >> 2, high >> 1, ASSEMBLY)
                word = _select(word, high, ASSEMBLY)
            for field in tl.static_range(FIELDS):
                codes = (odd if field % KINDS else word) >> PITCH * FIT * (field // KINDS // FIT)
                k = (i // STEPS * FIELDS + field) * SLICE + 2 * skipped
                s, z = _grid(grid, k, near, N, G, GROUP, BRAIN)
                a = _inputs(x, k, m, M, K, STEP, EVEN)
                w = _steps(codes, z, base, BITS, PITCH * (field // KINDS % FIT), BRAIN, ASSEMBLY)
                total += tl.dot(w, a) * (s.to(tl.float32) * 2.0 ** -(PITCH * (field // KINDS % FIT)))[:, None]
        _write(out, parts, arrivals, total, block, tiles, units, last - first == tiles, n, m, M, N, ROWS, OUTPUTS)


@triton.jit(do_not_specialize=["G", "tiles"])
def many_rows_kernel(
    x, words, grid, out, parts, arrivals, M, N, K, G, tiles, table,
    BITS: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BRAIN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One slice a step, its words read anew from the cache; weights get their scale before the product."""
    PARTS: tl.constexpr = 3 if BITS == 3 else 1
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    FIELDS: tl.constexpr = 16 // PLANE
    SLICES: tl.constexpr = 16 if BITS == 3 else FIELDS
    SLICE: tl.constexpr = 2 * WORDS
    STEPS: tl.constexpr = WORDS // STEP  # in which a slice is gone through
    units, begin, end = _share(tiles, M, N, ROWS, OUTPUTS)
    for block in range(begin // tiles, (end - 1) // tiles + 1):
        n, m, near, at, step = _place(words, block, M, N, WORDS, STEP, ROWS, OUTPUTS)
        total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
        base = tl.load(table + near * 0)
        first, last = tl.maximum(begin - block * tiles, 0), tl.minimum(end - block * tiles, tiles)
        for i in range(first * SLICES * STEPS, last * SLICES * STEPS):
            index, skipped = i // STEPS, i % STEPS * STEP
            tile, part, field = index // SLICES, index % SLICES // FIELDS, index % FIELDS
            k = index * SLICE + 2 * skipped
            here = at + tl.cast(tile, tl.int64) * PARTS * step + skipped
            word = tl.load(here + part * step) >> tl.load(table + 1 + PLANE * field + near * 0)[:, None]
            if BITS == 3:
                place = field // 2 * 4 + field % 2 + 2 - 2 * part
                high = tl.load(here + 2 * step) >> tl.load(table + 1 + place + near * 0)[:, None]
                word = _select(word, high << 2, ASSEMBLY)
            s, z = _grid(grid, k, near, N, G, GROUP, BRAIN)
            a = _inputs(x, k, m, M, K, STEP, EVEN)
            w = _steps(word, z, base, BITS, 0, BRAIN, ASSEMBLY)
            total = tl.dot(w * s[:, None], a, total)
        _write(out, parts, arrivals, total, block, tiles, units, last - first == tiles, n, m, M, N, ROWS, OUTPUTS)
