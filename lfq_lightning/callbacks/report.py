"""Report: writes report.html when a run ends."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lfq_lightning.callbacks import CALLBACKS, BlockCallback
from lfq_lightning.errors import UserError
from lfq_lightning.file_names import REPORT
from lfq_lightning.report.write_report import write_report

log = logging.getLogger(__name__)


@CALLBACKS.register
class Report(BlockCallback):
    """A page about the run beside its model: what was lost, where, and how to load it. `lfq report` makes it again."""

    paper = "ours"

    def on_run_end(self, trainer: Trainer, metrics: dict[str, Any], folder: Path) -> None:
        if not trainer.is_global_zero:
            return
        try:
            log.info("%s", write_report([str(folder)], folder / REPORT))
        except UserError as error:  # the model is finished, whatever becomes of the page about it
            log.warning("the report was not written: %s `lfq report %s` makes it again.", error, folder)
