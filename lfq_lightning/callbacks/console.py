"""Console: what a run prints."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lfq_lightning.callbacks import CALLBACKS, BlockCallback, BlockReport
from lfq_lightning.clock import clock
from lfq_lightning.stages import BlockPlan

_ROWS = {
    "full_precision": "full precision",
    "before_last_training": "before the last training",
    "quantized": "quantised",
}


@CALLBACKS.register
class Console(BlockCallback):
    """A line per block, and the table of what was lost at the end; on a terminal also a live bar of the steps."""

    paper = "ours"

    def __init__(self) -> None:
        self.console = RichConsole(highlight=False, soft_wrap=True, markup=False)
        self.progress: Progress | None = None

    def on_run_start(self, trainer: Trainer, plans: list[BlockPlan]) -> None:
        self.console.quiet = not trainer.is_global_zero
        self.total = len(plans)
        dense = sum(not plan.layers for plan in plans)
        if dense:
            self.console.print(f"{dense} of {self.total} blocks match no rule and stay in full precision")
        if self.console.is_terminal and not self.console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.progress.start()

    def on_block_start(self, trainer: Trainer, plan: BlockPlan) -> None:
        if self.progress is not None:
            for task in self.progress.task_ids:
                self.progress.remove_task(task)
            self.progress.add_task(f"block {plan.index + 1}/{self.total}", total=plan.steps if plan.learned else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.progress is not None:
            self.progress.update(
                self.progress.task_ids[0], completed=(batch_idx + 1) // trainer.accumulate_grad_batches
            )

    def on_block_end(self, trainer: Trainer, report: BlockReport) -> None:
        loss, kl = f"{report.loss_after:.4g}", f"{report.kl_after:.4f}"
        if report.best_step:
            loss = f"{report.loss_before:.4g} → {report.loss_after:.4g} at step {report.best_step}"
            kl = f"{report.kl_before:.4f} → {kl}"
        self.console.print(
            f"block {report.index + 1:>{len(str(self.total))}}/{self.total}  "
            f"{'+'.join(report.quantizers) or 'full precision'}  {report.objective} {loss}  kl {kl}  "
            f"{report.seconds:.1f} s  peak {report.peak_bytes / 2**30:.2f} GiB  eta {clock(report.eta_seconds)}"
        )

    def on_run_end(self, trainer: Trainer, metrics: dict[str, Any], folder: Path) -> None:
        self._stop()
        table = Table(title="on held-out tokens")
        table.add_column("model")
        for name in ("KL to FP", "top-1 agreement", "flip rate", "perplexity"):
            table.add_column(name, justify="right")
        for key, label in _ROWS.items():
            row = metrics[key]["held_out"]
            table.add_row(
                label,
                f"{row['kl']:.4f}",
                f"{row['top1_agreement']:.4f}",
                f"{row['flip_rate']:.4f}",
                f"{row['perplexity']:.2f}",
            )
        self.console.print(table)
        size, minutes = f"{metrics['model_bytes'] / 1e6:.1f} MB of weights", clock(metrics["seconds"])
        self.console.print(f"{folder}: {size}, made in {minutes}, peak {metrics['peak_bytes'] / 2**30:.2f} GiB")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
