"""A fit, and the block in training: what it ships without it, how far it is, and what it was at its start."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer
from torch import Tensor

from lfq_lightning.calibration.bench import Bench
from lfq_lightning.calibration.lens import Lens
from lfq_lightning.calibration.weighted_mean import WeightedMean
from lfq_lightning.callbacks.block_callback import BlockReport
from lfq_lightning.peak_memory import peak_bytes
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.runs.block_state import BlockState, read_facts
from lfq_lightning.runs.shards import Shards
from lfq_lightning.runs.spent import Meter
from lfq_lightning.stages import BlockPlan

log = logging.getLogger(__name__)


@dataclass
class Fit:
    """What lives as long as one fit.

    Args:
        bench: where blocks are calibrated.
        shards: what they have shipped.
        frequency: how often each token occurs in the calibration data, (V,) int64.
        taken: how many blocks an earlier run has done.
        fingerprint: of the last block that was begun.
        started: when the first block was begun, by `time.perf_counter`.
    """

    bench: Bench
    shards: Shards
    frequency: Tensor
    taken: int
    fingerprint: str
    started: float


@dataclass
class BlockInTraining:
    """One block from its solution to its shard.

    Args:
        plan: its plan.
        solved: the codes of layers that are not trained.
        state: its step, and the best one.
        lens: reads the KL behind it.
        start_loss: held-out loss before training.
        start_hidden: its held-out outputs then, (N, T, D).
        start_kl: the KL behind it then.
        started: when it was begun, by `time.perf_counter`.
        check_every: batches between two held-out checks.
        held_out_loss: of the check that is under way.
        trained: all its steps are done.
    """

    plan: BlockPlan
    solved: dict[str, QuantizedTensor]
    state: BlockState
    lens: Lens
    start_loss: float
    start_hidden: Tensor
    start_kl: float
    started: float
    check_every: int
    held_out_loss: WeightedMean
    trained: bool = False

    def resume(self, file: Path, bench: Bench, meter: Meter) -> None:
        """Begin where an earlier process has left the training of this very block in `file`, if one has."""
        left = bench.ranks.once(lambda: read_facts(file, self.state.fingerprint))
        step = left.get("step", 0)
        if step:
            log.info("block %d resumes from step %d", self.plan.index, step)
            meter.add(left["spent"])
        self.state.step = bench.first_step = step

    def report(
        self,
        bench: Bench,
        weights: dict[str, dict[str, float]],
        kl_after: float,
        cache_error: dict[str, float],
        eta_seconds: float,
    ) -> BlockReport:
        """Return what became of it; `weights` are the statistics of each layer."""
        return BlockReport(
            index=self.plan.index,
            name=self.plan.stage.title or " + ".join(bench.current.block.names),
            objective=self.plan.objective.name,
            quantizers=sorted({(layer.learned or layer.closed_form).name for layer in self.plan.layers.values()}),
            loss_before=self.start_loss,
            loss_after=self.state.best_loss,
            loss_last=self.state.last_loss,
            best_step=self.state.best_step,
            kl_before=self.start_kl,
            kl_after=kl_after,
            cache_error=cache_error,
            seconds=time.perf_counter() - self.started,
            peak_bytes=peak_bytes(bench.device),
            weights=weights,
            eta_seconds=eta_seconds,
        )


def check_every(trainer: Trainer, plan: BlockPlan) -> int:
    """Return how many batches lie between two held-out checks of a block."""
    batches = plan.steps * trainer.accumulate_grad_batches if plan.learned else 1
    interval = trainer.val_check_interval
    assert isinstance(interval, float), "preflight has checked that"
    return max(1, int(batches * interval))
