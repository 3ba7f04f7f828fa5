"""Other block shapes for the packed products that fall short of their targets, each checked and then timed on a GPU.

    python -m benchmarks.kernels.sweep [--dry-run] [--seconds 120]

A candidate replaces what `block_of` returns. It is first compared with dense weights on a small product, whose outputs
and inputs fill no whole block; a wrong one is named and not timed, and one that needs more than the card has is named
too. Rows go to benchmarks/results/sweep.csv as they come, the kernel's own choice first; one that is there, of this
card and this code, is not made again. `--dry-run` checks in Triton's interpreter, which knows no warps, and times
nothing.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.kernels import cases
from benchmarks.kernels.__main__ import OURS, copy_rate, time_side
from benchmarks.rows import ROOT, append, code_digest, finished
from lfq_lightning.errors import one_line
from lfq_lightning.grids import IntegerGrid
from lfq_lightning.ops.packed_matmul import triton as kernel
from lfq_lightning.quantized_tensor import QuantizedTensor

RESULTS = ROOT / "benchmarks" / "results" / "sweep.csv"
# rows, outputs, inputs, bits: what docs/kernels.md has as short, the worst first
SHORT = [
    (1, 28672, 8192, 2),
    (1, 28672, 8192, 3),
    (1, 4096, 4096, 4),
    (1, 28672, 8192, 4),
    (16, 28672, 8192, 2),
    (16, 28672, 8192, 3),
    (256, 28672, 8192, 3),
    (256, 28672, 8192, 4),
]
FEW = list(product((32, 64, 128), (1, 2, 4), (2, 3, 4), (0, 2, 4, 8)))  # outputs, warps, stages, resident
MANY = list(product((64, 128, 256), (4, 8), (2, 3), (0, 1, 2)))
MOST_ROWS_OF_FEW = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="check the candidates in the interpreter")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no candidate later than that")
    given = parser.parse_args()
    if given.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":
            sys.exit("benchmarks.kernels.sweep --dry-run needs TRITON_INTERPRET=1.")
        for rows, _, _, bits in SHORT:
            every = list(candidates(rows, bits))
            shapes = {(each.outputs, each.resident == 0): each for each in every}.values()
            wrong = [label(each) for each in shapes if difference(each, rows, bits, "cpu") > 1]
            print(f"W{bits} {rows} rows: {len(every)} candidates, wrong: {wrong or 'none'}", flush=True)
            if wrong:
                sys.exit(1)
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels.sweep needs a CUDA GPU; --dry-run goes without one.")
    begun, rate = time.monotonic(), copy_rate()
    for number, (rows, outputs, inputs, bits) in enumerate(SHORT, start=1):
        until = begun + given.seconds * number / len(SHORT)  # none of them takes the time of all
        case = cases._packed_matmul(rows, outputs, inputs, bits)
        for block in candidates(rows, bits):
            cell = {"device": torch.cuda.get_device_name(), "case": case.name, "block": label(block)}
            cell |= {"code": code_digest("ops/packed_matmul")}
            if finished(cell, RESULTS) or time.monotonic() > until:
                continue
            row = cell | timed(block, case, rows, bits, rate)
            append(RESULTS, row)
            print(*row.values(), flush=True)


def candidates(rows: int, bits: int) -> list[kernel.Block]:
    """Return the kernel's own block, then others, nearest first; sums take half of a thread's registers at most."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = kernel.block_of(rows, bits, kernel._has_much_shared_memory(device))
    others = []
    for outputs, warps, stages, resident in FEW if rows <= MOST_ROWS_OF_FEW else MANY:
        other = replace(own, outputs=outputs, warps=warps, stages=stages, resident=resident)
        sums = outputs * own.rows / (32 * warps)  # registers of a thread
        if outputs >= 16 * warps and sums <= 128:
            others.append(other)
    return sorted({own, *others}, key=lambda other: (_steps_from(own, other), label(other)))


def _steps_from(own: kernel.Block, other: kernel.Block) -> int:
    return sum(getattr(own, name) != getattr(other, name) for name in ("outputs", "warps", "stages", "resident"))


def label(block: kernel.Block) -> str:
    """Return a block's numbers, for a row."""
    return " ".join(f"{name}={getattr(block, name)}" for name in ("rows", "outputs", "warps", "stages", "resident"))


def timed(block: kernel.Block, case: cases.Case, rows: int, bits: int, rate: float) -> dict[str, str]:
    """Return a candidate's columns."""
    micros, note = float("nan"), ""
    try:
        if (apart := difference(block, rows, bits, "cuda")) > 1:
            note = f"wrong: {apart:.3g} times the rounding it may have"
        else:
            with _choosing(block):
                micros, _ = time_side(case.sides()[OURS]())
    except OutOfResources as error:  # more shared memory or registers than there are: a result
        note = one_line(error)[:100]
    share = f"{case.bytes / (micros / 1e6) / rate:.3f}"
    return {"microseconds": f"{micros:.1f}", "share_of_copy": share, "note": note}


def difference(block: kernel.Block, rows: int, bits: int, device: str) -> float:
    """Return the largest error of a small product in units of what its dtype's rounding may make of it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter's bfloat16 is not IEEE's
    outputs, inputs = 70, 320
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=draw, dtype=torch.uint8).to(device)
    scale = (torch.rand(outputs, inputs // 64, 1, generator=draw) + 0.5).to(device, dtype)
    quantized = QuantizedTensor(codes, scale, torch.full_like(scale, 1).byte(), IntegerGrid(bits, 64))
    x = torch.randn(rows, inputs, generator=draw).to(device, dtype)
    with _choosing(block):
        found = kernel.matmul(x, kernel.tile(quantized))
    weight = quantized.dequantize().double()
    exact, bound = x.double() @ weight.T, (x.double().abs() @ weight.abs().T) * torch.finfo(dtype).eps
    return float(((found.double() - exact).abs() / (bound + 1e-6)).max())


@contextmanager
def _choosing(block: kernel.Block) -> Iterator[None]:
    """Let the kernel take this block for every product."""
    usual, kernel.block_of = kernel.block_of, lambda m, bits, large: block
    try:
        yield
    finally:
        kernel.block_of = usual


if __name__ == "__main__":
    main()
