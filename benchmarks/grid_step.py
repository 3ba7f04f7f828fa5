"""How long a training step takes on a named grid, against integers of its bits: `python -m benchmarks.grid_step`.

A step is AdaRound's soft rounding of one layer, its product with 8 sequences of 256 tokens, and both backwards; CPU
seconds of one thread, medians of steps taken by turns. Rows go to results/grid_step.csv.
"""

import csv
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cpu import cpu
from lfq_lightning.grids import GRIDS, Grid, IntegerGrid
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer

RESULTS = Path(__file__).parent / "results" / "grid_step.csv"
SHAPE, TOKENS, STEPS = (768, 2048), 2048, 9


def main() -> None:
    torch.set_num_threads(1)
    weight, inputs = torch.randn(SHAPE) * 0.02, torch.randn(TOKENS, SHAPE[1])
    rows = []
    for name in GRIDS.names():
        grid = GRIDS.get(name)()
        integers = IntegerGrid(grid.num_bits, grid.group_size, grid.symmetric)
        both = [quantizer(weight, each) for each in (grid, integers)]
        seconds = [[step(each, inputs) for each in both] for _ in range(STEPS)]
        ours, plain = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows.append(
            {"grid": name, "seconds": f"{ours:.4f}", "integers": f"{plain:.4f}", "ratio": f"{ours / plain:.3f}"}
        )
        print(*rows[-1].values(), flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "cpu"])
        writer.writeheader()
        writer.writerows(row | {"cpu": cpu()} for row in rows)


def quantizer(weight: Tensor, grid: Grid) -> LearnedQuantizer:
    start = QUANTIZERS.parse("rtn").build(weight, grid.fitted(weight), torch.bfloat16)
    start.solve()
    return QUANTIZERS.parse("adaround").build(start.latent, start.export())


def step(learned: LearnedQuantizer, inputs: Tensor) -> float:
    started = time.process_time()
    (inputs @ learned().T).square().mean().backward()
    return time.process_time() - started


if __name__ == "__main__":
    main()
