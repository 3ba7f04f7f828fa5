"""A calibration of five blocks of Llama-3 8B's sizes and its head on a GPU, and what it says of all 32.

    python -m benchmarks.calibrate_8b --work runs/8b [--dry-run] [--seconds 300]

Random weights; 128 sequences of 2048 tokens, 200 steps of 8, as AutoRound's authors time it. A row has the seconds of a
middle block and of the last, as the journal has them, the run's peak of memory, what `lfq plan` says of the run at the
matmul rate that the card shows, and the projection: 31 middle blocks, the last, and once what is neither. Rows go to
benchmarks/results/calibrate_8b.csv; one that is there, of this card and this code, is not made again. `--dry-run` does
the same on a CPU with a small model and writes no row.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.decode import LLAMA_8B
from benchmarks.kernels.__main__ import copy_rate, matmul_rate
from benchmarks.quality.methods import METHODS, RECIPE, Plan, Setting
from benchmarks.rows import ROOT, append, code_digest, finished
from benchmarks.scale import run, save_wide
from lfq_lightning.planning.plan_run import Machine, plan_config
from lfq_lightning.run import read_config

RESULTS = ROOT / "benchmarks" / "results" / "calibrate_8b.csv"
BLOCKS, OF = 5, LLAMA_8B["num_hidden_layers"]
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"vocab_size": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for what lies between; 5 GB")
    parser.add_argument("--dry-run", action="store_true", help="a small model on a CPU, no rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run later than that")
    given = parser.parse_args()
    if not (given.dry_run or torch.cuda.is_available()):
        parser.exit(1, "benchmarks.calibrate_8b needs a CUDA GPU; --dry-run goes without one.\n")
    begun = time.monotonic()
    given.work.mkdir(parents=True, exist_ok=True)
    steps, batch_size = (4, 2) if given.dry_run else (200, 8)
    setting = Setting(4, 128, False, steps, batch_size, (steps, steps, batch_size))
    for name in (RECIPE, "gptq"):
        device = "cpu" if given.dry_run else torch.cuda.get_device_name()
        cell = {"device": device, "run": name, "code": code_digest("calibration", "quantizers", "objectives", "ops")}
        if (not given.dry_run and finished(cell, RESULTS)) or time.monotonic() - begun > given.seconds:
            continue
        found = measure(given.work, name, METHODS[name](setting), given.dry_run)
        row = cell | {key: f"{value:.4g}" for key, value in found.items()}
        print(*row.values(), flush=True)
        if not given.dry_run:
            append(RESULTS, row)


def measure(work: Path, name: str, plan: Plan, dry: bool) -> dict[str, float]:
    """Return the columns of a run."""
    work = work / ("small" if dry else "8b")
    work.mkdir(exist_ok=True)
    (work / "text.txt").write_text((ROOT / "LICENSE").read_text() * 40)
    model = work / "model"
    if not (model / "model.safetensors.index.json").is_file():
        sizes = {key: value for key, value in LLAMA_8B.items() if key != "num_hidden_layers"}
        save_wide(model, SMALL if dry else sizes, BLOCKS)
    samples, length = (8, 64) if dry else (128, 2048)
    data = {"dataset": str(work / "text.txt"), "num_samples": samples, "seq_len": length, "num_held_out": 2}
    precision, accelerator = ("32-true", "cpu") if dry else ("bf16-mixed", "gpu")
    seconds, peak = run(work, name, model, plan, data, precision, accelerator)
    config = read_config(["run", "--config", str(work / f"{name}.json")])
    rate = 1e11 if dry else matmul_rate(torch.bfloat16)
    bandwidth = 1e10 if dry else copy_rate()
    planned = plan_config(config, Machine(1, 1, 2**40, not dry, rate, bandwidth, "measured"))
    blocks = [json.loads(line)["seconds"] for line in (work / name / "journal.jsonl").read_text().splitlines()]
    middle, last = statistics.median(blocks[1:-1]), blocks[-1]
    return {
        "middle_block_seconds": middle,
        "last_block_seconds": last,
        "seconds": seconds,
        "planned_seconds": planned.seconds,
        "peak_gigabytes": peak / 1e9,
        "planned_peak_gigabytes": (planned.cpu_peak if dry else planned.device_peak) / 1e9,
        "share_of_matmul": planned.work.flop / sum(blocks) / rate,
        "projected_seconds": (OF - 1) * middle + last + seconds - sum(blocks),
    }


if __name__ == "__main__":
    main()
