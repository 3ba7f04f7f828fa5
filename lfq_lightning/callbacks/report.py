"""Report: writes report.html when a run ends."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lfq_lightning.callbacks import CALLBACKS, BlockCallback
from lfq_lightning.report.write_report import REPORT, write_report

log = logging.getLogger(__name__)


@CALLBACKS.register
class Report(BlockCallback):
    """A page about the run beside its model: what was lost, where, and how to load it. `lfq report` makes it again."""

    paper = "ours"

    def on_run_end(self, trainer: Trainer, metrics: dict[str, Any], folder: Path) -> None:
        if trainer.is_global_zero:
            log.info("%s", write_report([str(folder)], folder / REPORT))
