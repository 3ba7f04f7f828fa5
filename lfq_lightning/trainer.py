"""Trainer: Lightning's Trainer with the defaults that one fit through all blocks needs."""

from typing import Any

import lightning.pytorch as pl

from lfq_lightning.calibration_module import CalibrationModule
from lfq_lightning.callbacks.block_scheduler import BlockScheduler
from lfq_lightning.data import CalibrationData
from lfq_lightning.errors import UserError


class Trainer(pl.Trainer):
    """Lightning's Trainer: every argument of it holds; only some defaults differ."""

    def __init__(
        self,
        *,
        devices: list[int] | str | int = 1,
        precision: str = "bf16-mixed",
        max_epochs: int = -1,
        val_check_interval: float = 0.25,
        num_sanity_val_steps: int = 0,
        reload_dataloaders_every_n_epochs: int = 1,
        enable_checkpointing: bool = False,
        enable_progress_bar: bool = False,
        enable_model_summary: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            devices=devices,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=max_epochs,
            val_check_interval=val_check_interval,
            num_sanity_val_steps=num_sanity_val_steps,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            **kwargs,
        )

    def run(self, model: CalibrationModule, datamodule: CalibrationData) -> None:
        """Quantise a model block by block and write it packed.

        Raises UserError if the run was stopped before its last block.
        """
        everyone = self.callbacks  # type: ignore[attr-defined]
        schedulers = [callback for callback in everyone if isinstance(callback, BlockScheduler)]
        for scheduler in schedulers:
            scheduler.prepare(self, model, datamodule)
        self.fit(model, datamodule=datamodule)
        if not all(scheduler.finished for scheduler in schedulers):
            raise UserError(
                f"the run was stopped before its last block; finished shards are in {schedulers[0].folder.path}, but "
                "not a whole model; raise max_time, max_steps or max_epochs, or remove what stopped it."
            )
