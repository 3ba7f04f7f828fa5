"""What Lightning and the scheduler cost per optimisation step, against a plain PyTorch loop of the same block.

    python -m benchmarks.overhead --checkpoint MODEL

Both train the final block by LFQ on the same activations, in alternating stretches of steps in one process, so that the
machine's drift hits both; the framework's stretch is timed from callbacks. Rows go to benchmarks/results/overhead.csv.
"""

import argparse
import csv
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lfq_lightning.calibration.calibration_module import CalibrationModule
from lfq_lightning.callbacks.block_scheduler import BlockScheduler
from lfq_lightning.data import CalibrationData
from lfq_lightning.stages import Rule
from lfq_lightning.trainer import Trainer as CalibrationTrainer

RESULTS = Path(__file__).parent / "results" / "overhead.csv"


class Alternate(Callback):
    """After every `stretch` framework steps, runs as many by hand on a copy of the block."""

    def __init__(self, stretch: int) -> None:
        self.stretch = stretch
        self.framework: list[float] = []
        self.plain: list[float] = []
        self.started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CalibrationModule)
        if not pl_module.current.plan.learned:
            return
        self.module = pl_module.current
        self.loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        self.batches = itertools.cycle(self.loader)
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.started or (batch_idx + 1) % self.stretch:
            return
        self.framework.append((time.perf_counter() - self.started) / self.stretch)
        self.plain.append(self._by_hand() / self.stretch)
        self.started = time.perf_counter()

    def _by_hand(self) -> float:
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        kept = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.Adam(parameters, lr=1e-6)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.ones_like(parameter),
            }
        for step in range(self.stretch + 1):
            if step == 1:  # the first one touches the fresh optimizer's memory
                started = time.perf_counter()
            batch = next(self.batches)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.module.training_step(batch)
            assert loss is not None
            loss.backward()
            optimizer.step()
            cosine.step()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--stretches", type=int, default=16)
    parser.add_argument("--stretch", type=int, default=5)
    given = parser.parse_args()
    quantizer = {"name": "flexround", "bits": 3, "group_size": 64}
    steps = given.stretches * given.stretch
    rule = Rule("last", quantizer, objective="logit_ce", steps=steps, batch_size=4)
    alternate = Alternate(given.stretch)
    with tempfile.TemporaryDirectory() as scratch:
        scheduler = BlockScheduler([rule], f"{scratch}/run")
        data = CalibrationData(num_samples=8, seq_len=256, num_held_out=2)
        # One validation, at the end: it is not part of a step.
        trainer = CalibrationTrainer(
            accelerator="cpu",
            callbacks=[scheduler, alternate],
            val_check_interval=1.0,
            logger=False,
            default_root_dir=scratch,
        )
        trainer.run(CalibrationModule(given.checkpoint), data)
    framework, plain = alternate.framework[1:], alternate.plain[1:]  # the first stretch warms up
    ratio = statistics.median(f / p for f, p in zip(framework, plain, strict=True))
    row = {
        "steps": steps,
        "framework_step_seconds": f"{statistics.median(framework):.4f}",
        "plain_step_seconds": f"{statistics.median(plain):.4f}",
        "median_ratio": f"{ratio:.4f}",
    }
    print(row)
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
