"""The last block by LFQ against the same block by MSE: same start, same steps, same tokens.

    python -m benchmarks.lfq_vs_mse --case smollm2-w3g64 --checkpoint MODEL --dataset TEXT

Runs `lfq run` three times per seed (last block by mse, by logit_ce, and left in full precision; the others by GPTQ) and
appends a row per run to benchmarks/results/lfq_vs_mse.csv. The difference is paired over held-out sequences.
"""

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "lfq_vs_mse.csv"
LAST = ("full_precision", "mse", "logit_ce")


@dataclass(frozen=True)
class Case:
    blocks: int
    bits: int
    group_size: int
    num_samples: int
    seq_len: int
    steps: int
    lr: float
    batch_size: int


CASES = {
    "smollm2-w3g64": Case(30, 3, 64, num_samples=32, seq_len=512, steps=100, lr=3e-3, batch_size=2),
    "stories15m-w3g96": Case(6, 3, 96, num_samples=128, seq_len=256, steps=200, lr=2e-3, batch_size=8),
    "stories15m-w2g32": Case(6, 2, 32, num_samples=128, seq_len=256, steps=200, lr=2e-3, batch_size=8),
}


def calibrate(case: Case, checkpoint: str, dataset: str, seed: int, last: str, output: Path) -> dict[str, Any]:
    """Run one calibration and return its metrics.json."""
    gptq = {"name": "gptq", "bits": case.bits, "group_size": case.group_size}
    flexround = {**gptq, "name": "flexround", "init": "gptq"}
    training = {"steps": case.steps, "lr": case.lr, "batch_size": case.batch_size}
    plan: list[dict[str, Any]] = [{"match": index, "quantizer": gptq} for index in range(case.blocks - 1)]
    if last != "full_precision":
        plan.append({"match": "last", "quantizer": flexround, "objective": last, **training})
    config = {
        "seed_everything": seed,
        "model": {"checkpoint": checkpoint},
        "data": {"dataset": dataset, "num_samples": case.num_samples, "seq_len": case.seq_len, "num_held_out": 16},
        "plan": plan,
        "output": str(output),
    }
    file = output.with_suffix(".json")
    file.write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "lfq_lightning", "run", "--config", str(file)], check=True)
    return json.loads((output / "metrics.json").read_text())


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Return the mean of a - b over held-out sequences and its standard error."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in given.seeds:
            runs = {
                last: calibrate(
                    CASES[given.case], given.checkpoint, given.dataset, seed, last, Path(scratch) / f"{seed}-{last}"
                )
                for last in LAST
            }
            start = runs["logit_ce"]["before_last_training"]["held_out"]
            rows.append(_row(given.case, seed, "start (gptq)", start))
            rows += [_row(given.case, seed, last, run["held_out"]) for last, run in runs.items()]
            for name in ("kl", "top1_agreement"):
                lfq, mse = (runs[last]["quantized"]["per_sequence"][name] for last in ("logit_ce", "mse"))
                mean, error = paired(lfq, mse)
                print(f"{given.case} seed {seed}: {name} logit_ce - mse = {mean:+.4f} ± {error:.4f}")
                rows[-1][f"{name}_minus_mse"], rows[-1][f"{name}_standard_error"] = f"{mean:.5f}", f"{error:.5f}"
    _append(rows)


def _row(case: str, seed: int, last: str, held_out: dict[str, float]) -> dict[str, Any]:
    return {"case": case, "seed": seed, "last_block": last, **{k: f"{v:.5f}" for k, v in held_out.items()}}


def _append(rows: list[dict[str, Any]]) -> None:
    extra = [f"{name}_{what}" for name in ("kl", "top1_agreement") for what in ("minus_mse", "standard_error")]
    columns = [*(column for column in rows[0] if column not in extra), *extra]
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
