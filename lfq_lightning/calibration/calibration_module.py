"""CalibrationModule: the LightningModule a Trainer fits; it is the block that the scheduler has on the bench."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lfq_lightning.calibration.activation_cache import Batch, BatchLoader
from lfq_lightning.calibration.bench import Bench
from lfq_lightning.calibration.calibration_block import CalibrationBlock
from lfq_lightning.models.checkpoints import open_checkpoint


class CalibrationModule(LightningModule):
    """Delegates to the CalibrationBlock on the `bench`, where the BlockScheduler puts one after another.

    Args:
        checkpoint: the full-precision model: a Hugging Face folder, a hub id, or a .gguf file.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        self.checkpoint = open_checkpoint(checkpoint)
        self.bench: Bench | None = None

    @property
    def current(self) -> CalibrationBlock:
        return self.placed.current

    @property
    def placed(self) -> Bench:
        assert self.bench is not None, "the BlockScheduler callback sets up the bench before the first block"
        return self.bench

    def train_dataloader(self) -> BatchLoader:
        return self.placed.train_dataloader()

    def val_dataloader(self) -> BatchLoader:
        return self.placed.val_dataloader()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if not self.current.plan.learned:  # Lightning skips None, which several processes may not do
            return None if self.trainer.world_size == 1 else torch.zeros((), device=self.device, requires_grad=True)
        step = self.placed.first_step + batch_idx // self.trainer.accumulate_grad_batches
        loss = self.current.training_step(batch, step)
        self.log("train/loss", loss.detach(), sync_dist=True)
        return loss

    def configure_model(self) -> None:
        """Lightning's place to shard a model; here each block is sharded when the scheduler has prepared it."""

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.current.validation_step(batch, batch_idx)  # the scheduler adds them up, over ranks too

    def configure_optimizers(self) -> Any:
        # Lightning asks once before the first block is placed; the scheduler asks again at the start of each epoch.
        return self.current.configure_optimizers() if self.bench is not None else None
