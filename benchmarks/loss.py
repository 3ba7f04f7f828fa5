"""The LFQ loss and its gradient by the identity, against naive autograd in the same dtype: time and extra peak memory.

    python -m benchmarks.loss

Naive: the student's logits by autograd, the teacher's recomputed each step (nobody stores V numbers a token). Each side
runs in processes of its own, in turn. Appends rows to benchmarks/results/loss.csv.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "loss.csv"
SIDES = ("naive", "identity")


def measure(side: str, dtype_name: str, tokens: int, width: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Return median seconds per loss-and-gradient and the extra peak resident bytes, in this process."""
    import torch

    from lfq_lightning.ops.linear_soft_ce import linear_soft_ce

    torch.manual_seed(0)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype_name]
    weight = (torch.randn(vocabulary, width) * 0.1).to(dtype)
    teacher = torch.randn(tokens, width)
    hidden = teacher + 0.3 * torch.randn(tokens, width)
    moment = torch.randn(tokens, width)  # the teacher's; its values do not matter here
    weight @ torch.ones(width, 8, dtype=dtype)  # the kernels' own buffers are not counted

    def naive() -> None:
        h = hidden.to(dtype).requires_grad_()
        with torch.no_grad():
            p = (teacher.to(dtype) @ weight.T).float().softmax(-1)
        loss = -(p * (h @ weight.T).float().log_softmax(-1)).sum(-1).mean()
        loss.backward()

    def identity() -> None:
        h = hidden.clone().requires_grad_()
        linear_soft_ce(h, weight, moment).mean().backward()

    step = {"naive": naive, "identity": identity}[side]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = resident_kb("VmRSS")
    step()
    extra = resident_kb("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "extra_peak_bytes": extra * 1024}


def resident_kb(field: str) -> int:
    """Read a line of Linux's account of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="the sides take turns; medians over rounds")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = (given.tokens, given.width, given.vocabulary)
    if given.side:
        print(json.dumps(measure(given.side, given.dtype, *shape, given.repeats)))
        return
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["dtype", "tokens", "width", "vocabulary", "side", "seconds", "extra_peak_mb"])
        for dtype in ("float32", "bfloat16"):
            rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for side in SIDES * given.rounds:
                command = [sys.executable, "-m", "benchmarks.loss", "--side", side, "--dtype", dtype]
                sizes = zip(("--tokens", "--width", "--vocabulary", "--repeats"), (*shape, given.repeats), strict=True)
                command += [word for name, size in sizes for word in (name, str(size))]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                rounds[side].append(json.loads(output.splitlines()[-1]))
            found = {
                side: {name: statistics.median(run[name] for run in runs) for name in ("seconds", "extra_peak_bytes")}
                for side, runs in rounds.items()
            }
            for side, medians in found.items():
                seconds, extra = f"{medians['seconds']:.4f}", f"{medians['extra_peak_bytes'] / 1e6:.1f}"
                writer.writerow([dtype, *shape, side, seconds, extra])
            ratio = {name: found["naive"][name] / found["identity"][name] for name in found["naive"]}
            print(f"{dtype}: {ratio['seconds']:.2f}x faster, 1/{ratio['extra_peak_bytes']:.1f} of the extra memory")


if __name__ == "__main__":
    main()
