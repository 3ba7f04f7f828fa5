"""The kernels on a GPU: checked, then timed against what one would use instead, and against what the card can do.

    python -m benchmarks.kernels [--dry-run] [--only fake_quant packed_matmul …] [--seconds 300]

First the operation's GPU tests run; a kernel whose test is red is not timed. Then, in one process: the card's copy
bandwidth and its bf16 matmul rate; every case, each time with other buffers and the second-level cache filled with
something else; medians. Rows go to benchmarks/results/kernels.csv as they come; a side that has one, of this card and
if it is ours of this code, is not timed again. `--dry-run` needs no GPU: it lists every case with the bytes and FLOP
it cannot do without, and the time these take on an H200. Peers are timed where they are installed (`pip install
bitsandbytes liger-kernel gemlite`); a peer that is absent or fails is named with its reason.
"""

import argparse
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.kernels.cases import CASES, Case, Side
from benchmarks.rows import ROOT, append, code_digest, finished
from lfq_lightning.errors import one_line

RESULTS = Path(__file__).parents[1] / "results" / "kernels.csv"
# bytes/s and FLOP/s by the data sheet; for --dry-run
H200 = {"copy": 4.8e12, torch.bfloat16: 989e12, torch.float32: 67e12}
TESTS = {
    "fake_quant": "test_fake_quant.py",
    "soft_round": "test_soft_round.py",
    "linear_soft_ce": "test_linear_soft_ce.py",
    "gptq_solve": "test_gptq_solve.py",
    "packed_matmul": "test_packed_kernel.py",
    "bitstream": "test_bitstream.py",
}
OURS = "triton"
QUEUE_CYCLES = 2_000_000  # about a millisecond
CACHE_BYTES = 2**28  # read between two runs, more than any second-level cache; what is written goes out in the next run
REPEATS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="list the cases and their floors; needs no GPU")
    parser.add_argument("--only", nargs="+", choices=sorted(TESTS), default=sorted(TESTS), help="operations")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case later than that")
    given = parser.parse_args()
    wanted = [case for case in CASES if case.operation in given.only]
    if given.dry_run:
        list_cases(wanted)
        return
    begun = time.monotonic()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA GPU; --dry-run lists the cases without one.")
    wanted = [case for case in wanted if missing(case)]
    if not wanted:
        return
    green = tested(sorted({case.operation for case in wanted}))
    copy, matmul = copy_rate(), {dtype: matmul_rate(dtype) for dtype in (torch.bfloat16, torch.float32)}
    rates = ", ".join(f"{dtype} matmul {rate / 1e12:.0f} TFLOP/s" for dtype, rate in matmul.items())
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, {rates}")
    for case in wanted:
        if time.monotonic() - begun > given.seconds:
            print(f"{given.seconds:g} s have passed: the rest is left to the next call")
            break
        if green[case.operation]:
            measure(case, copy, matmul)
        else:
            print(f"{case.operation:15} {case.name:34} not timed: its test is red")
    if not all(green.values()):
        sys.exit(1)


def list_cases(cases: list[Case]) -> None:
    """Print bytes, FLOP and the floor of each case."""
    for case in cases:
        by_bytes, by_flop = case.bytes / H200["copy"], case.flop / H200[case.products]
        floor, bound = max(by_bytes, by_flop) * 1e6, "bytes" if by_bytes > by_flop else "FLOP"
        numbers = f"{case.bytes / 1e9:9.4f} GB {case.flop / 1e12:9.4f} TFLOP"
        print(f"{case.operation:15} {case.name:34} {numbers}   floor on an H200 {floor:9.1f} µs, by {bound}")


def tested(operations: list[str]) -> dict[str, bool]:
    """Run the operations' GPU tests, and tell which are green."""
    files = [f"tests/ops/{TESTS[operation]}" for operation in operations]
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", str(os.cpu_count()), *files]
        subprocess.run([*command, f"--junit-xml={report.name}"], cwd=ROOT)
        return {operation: passed(report.name, operation) for operation in operations}


def passed(report: str, operation: str) -> bool:
    """Tell by a JUnit report whether an operation's tests ran and none failed."""
    name = f"tests.ops.{Path(TESTS[operation]).stem}"
    own = [case for case in ElementTree.parse(report).findall(".//testcase") if case.get("classname") == name]
    broken = any(case.find(bad) is not None for case in own for bad in ("failure", "error"))
    return not broken and any(case.find("skipped") is None for case in own)


def missing(case: Case) -> list[str]:
    """Return the sides of a case that have no row yet: of this card and, for ours, of this code."""
    cell = {"device": torch.cuda.get_device_name(), "operation": case.operation, "case": case.name}
    return [side for side in case.sides() if not finished(cell | {"side": side, "code": _code(case, side)}, RESULTS)]


def _code(case: Case, side: str) -> str:
    return code_digest(f"ops/{case.operation}") if side == OURS else ""


def measure(case: Case, copy: float, matmul: dict[torch.dtype, float]) -> None:
    """Time the sides of a case that are missing, each row kept as it comes."""
    for name in missing(case):
        note, micros, extra = "", float("nan"), float("nan")
        try:
            micros, extra = time_side(case.sides()[name]())
        except ImportError as error:  # may be installed another time: no row
            print(f"{case.operation:15} {case.name:34} {name:28} absent: {one_line(error)}", flush=True)
            continue
        except Exception as error:  # a peer's failure is a result; ours is one too, and the exit code is the tests'
            if "CUDA error" in str(error):  # nothing runs in this process any more
                raise
            note = f"{type(error).__name__}: {one_line(error)[:100]}"
        torch.cuda.empty_cache()
        seconds = micros / 1e6
        row = {
            "device": torch.cuda.get_device_name(),
            "operation": case.operation,
            "case": case.name,
            "side": name,
            "microseconds": f"{micros:.1f}",
            "gigabytes": f"{case.bytes / 1e9:.4f}",
            "teraflop": f"{case.flop / 1e12:.4f}",
            "share_of_copy": f"{case.bytes / seconds / copy:.3f}",
            "share_of_matmul": f"{case.flop / seconds / matmul[case.products]:.3f}",
            "extra_peak_megabytes": f"{extra / 1e6:.1f}",
            "note": note,
            "versions": " ".join(f"{p}={importlib.metadata.version(p)}" for p in ("torch", "triton")),
            "code": _code(case, name),
        }
        append(RESULTS, row)
        shown = (row["operation"], row["case"], row["side"], row["microseconds"], row["note"])
        print("{:15} {:34} {:28} {:>10} {}".format(*shown), flush=True)


def time_side(side: Side) -> tuple[float, int]:
    """Return the median microseconds of one call, cache cold and buffers changing, and the bytes it allocates."""
    flush = torch.zeros(CACHE_BYTES // 4, device="cuda")
    buffers = cycle(side.buffers)
    for _ in range(3):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.run(*next(buffers))
        extra = torch.cuda.max_memory_allocated() - before
    times = []
    for _ in range(REPEATS):
        arguments = next(buffers)
        flush.sum()
        torch.cuda._sleep(QUEUE_CYCLES)  # until all of the call is in the queue: its launch is not timed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        side.run(*arguments)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times), extra


def copy_rate() -> float:
    """Return bytes read and written per second by a large copy."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_side(Side([(target, source)], torch.Tensor.copy_))[0] * 1e6


def matmul_rate(dtype: torch.dtype) -> float:
    """Return FLOP per second of a large product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    product: Callable[..., torch.Tensor] = torch.matmul
    return 2 * 8192**3 / time_side(Side([(a, b)], product))[0] * 1e6


if __name__ == "__main__":
    main()
