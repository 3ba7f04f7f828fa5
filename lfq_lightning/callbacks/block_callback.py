"""BlockCallback: a Lightning callback that also hears when a block begins and ends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lfq_lightning.stages import BlockPlan


@dataclass(frozen=True)
class BlockReport:
    """What calibrating one block did.

    Losses are those of its objective on the held-out split: before training, as it ships, and of the last step; `kl_…`
    is the KL to full precision (nats per token) of what the head reads after the block; `cache_error` has the relative
    squared error of `keys` and `values` (CacheError), where layers of these names make them. `index` is its place in
    the run; `weights` has for each layer that ships packed what `weight_statistics` says of it.
    """

    index: int
    name: str
    objective: str
    quantizers: list[str]
    loss_before: float
    loss_after: float
    loss_last: float
    best_step: int
    kl_before: float
    kl_after: float
    cache_error: dict[str, float]
    seconds: float
    peak_bytes: int
    weights: dict[str, dict[str, float]]
    eta_seconds: float


class BlockCallback(Callback):
    """Base for callbacks that follow the BlockScheduler. All hooks do nothing by default."""

    def on_run_start(self, trainer: Trainer, plans: list[BlockPlan]) -> None:
        """Called once, with the plan of every block, when the run folder is open."""

    def on_block_start(self, trainer: Trainer, plan: BlockPlan) -> None:
        """Called when a block is read."""

    def on_block_end(self, trainer: Trainer, report: BlockReport) -> None:
        """Called when a block's shard is on disk and both activation streams stand behind it."""

    def on_run_end(self, trainer: Trainer, metrics: dict[str, Any], folder: Path) -> None:
        """Called once, with the content of metrics.json, when `folder` is a complete model."""


def listeners(trainer: Trainer) -> list[BlockCallback]:
    """Return the Trainer's callbacks that follow the blocks."""
    everyone = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in everyone if isinstance(callback, BlockCallback)]
