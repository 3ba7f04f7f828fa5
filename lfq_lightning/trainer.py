"""Trainer: Lightning's Trainer with the defaults that one fit through all blocks needs."""

import signal
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy

from lfq_lightning.calibration.calibration_module import CalibrationModule
from lfq_lightning.callbacks.block_scheduler import BlockScheduler
from lfq_lightning.data import CalibrationData
from lfq_lightning.distributed.fsdp2 import FSDP2, launched
from lfq_lightning.errors import UserError
from lfq_lightning.precision import AUTO, choose_precision


class Trainer(pl.Trainer):
    """Lightning's Trainer: every argument of it holds; only some defaults differ.

    Args:
        devices: on each node; as many as torchrun or srun has started if not said, else one.
        num_nodes: likewise.
        strategy: `fsdp2` for more than one process if not said.
        precision: `auto` is what the device multiplies fast in (`choose_precision`).
    """

    def __init__(
        self,
        *,
        devices: list[int] | str | int | None = None,
        num_nodes: int | None = None,
        strategy: str | Strategy = "auto",
        precision: str = AUTO,
        max_epochs: int = -1,
        val_check_interval: float = 0.25,
        num_sanity_val_steps: int = 0,
        reload_dataloaders_every_n_epochs: int = 1,
        enable_checkpointing: bool = False,
        enable_progress_bar: bool = False,
        enable_model_summary: bool = False,
        **kwargs: Any,
    ) -> None:
        found = launched() or (1, 1)
        devices = found[0] if devices is None else devices
        num_nodes = found[1] if num_nodes is None else num_nodes
        if strategy == "auto" and (num_nodes > 1 or not _one(devices)):
            strategy = "fsdp2"
        super().__init__(
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=choose_precision(precision, kwargs.get("accelerator", "auto")),  # type: ignore[arg-type]
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
        try:
            for scheduler in schedulers:
                scheduler.prepare(self, model, datamodule)
            self.fit(model, datamodule=datamodule)
        except Exception:
            if self.strategy.launcher is not None:
                self.strategy.launcher.kill(signal.SIGKILL)  # or they would wait for this process
            raise
        else:
            if isinstance(self.strategy, FSDP2):
                self.strategy.disconnect_at_exit()
        finally:
            for scheduler in schedulers:
                scheduler.release()
        if not all(scheduler.finished for scheduler in schedulers):
            where = schedulers[0].run.folder.path
            raise UserError(
                f"the run was stopped before its last block; finished shards are in {where}, but "
                "not a whole model; raise max_time, max_steps or max_epochs, or remove what stopped it."
            )


def _one(devices: list[int] | str | int) -> bool:
    """Tell whether this names one device; `auto` and -1 name all there are."""
    return len(devices) == 1 if isinstance(devices, list) else devices in (1, "1")
