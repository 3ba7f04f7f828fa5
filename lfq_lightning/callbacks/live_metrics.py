"""LiveMetrics: what the loggers see while a run goes on, and an alarm when a block goes wrong."""

import logging
import statistics

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lfq_lightning.callbacks import CALLBACKS, BlockCallback, BlockReport

log = logging.getLogger(__name__)

_BEFORE = 8  # blocks whose growth is what is usual
_JUMP = 3.0  # times the usual growth of the KL
_LEAST = 2  # blocks before a jump can be told


@CALLBACKS.register
class LiveMetrics(BlockCallback):
    """Gradient norm and learning rate beside the loss; after each block its losses, KL, time and memory.

    An alarm is a warning in the log: the KL along depth grows more than three times as fast as it did, or training has
    made a block worse than it was (its start ships then).
    """

    paper = "ours"

    def __init__(self) -> None:
        self._kl: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.loggers or not every or (trainer.global_step + 1) % every:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:  # a block with nothing to train
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        pl_module.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm, sync_dist=True)
        pl_module.log("train/lr", optimizer.param_groups[0]["lr"], sync_dist=True)

    def on_block_end(self, trainer: Trainer, report: BlockReport) -> None:
        numbers = {
            "block/index": float(report.index),
            "block/loss_before": report.loss_before,
            "block/loss_after": report.loss_after,
            "block/kl_before": report.kl_before,
            "block/kl_after": report.kl_after,
            "block/seconds": report.seconds,
            "block/peak_gib": report.peak_bytes / 2**30,
        } | {f"block/{kind}_error": error for kind, error in report.cache_error.items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        if trainer.is_global_zero:
            for alarm in self._alarms(report):
                log.warning("block %d: %s", report.index, alarm)
        self._kl.append(report.kl_after)

    def _alarms(self, report: BlockReport) -> list[str]:
        found = []
        if report.loss_last > report.loss_before:
            found.append(
                f"training took the held-out {report.objective} from {report.loss_before:.4g} to "
                f"{report.loss_last:.4g}; what ships is step {report.best_step}, but try a lower lr."
            )
        growth = [after / before for before, after in zip(self._kl, self._kl[1:], strict=False) if before > 0]
        if len(growth) >= _LEAST and self._kl[-1] > 0:
            usual, now = statistics.median(growth[-_BEFORE:]), report.kl_after / self._kl[-1]
            if now > _JUMP * max(1.0, usual):
                found.append(
                    f"the KL jumped from {self._kl[-1]:.4f} to {report.kl_after:.4f}, {now:.1f} times, where "
                    f"{usual:.1f} was usual; give this block more bits or another quantizer."
                )
        return found
