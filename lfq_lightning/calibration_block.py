"""CalibrationBlock: what BlockModule and FinalBlockModule share: a block's training by its objective."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lfq_lightning.activation_cache import Batch
from lfq_lightning.decoder_block import DecoderBlock
from lfq_lightning.head import Head
from lfq_lightning.objectives import Objective
from lfq_lightning.plan import BlockPlan


class CalibrationBlock(LightningModule, ABC):
    """The student of one block.

    Args:
        block: the decoder block; its linear layers are quantised, or still full precision before `solve`.
        objective: what training minimises and held-out selection compares.
        plan: steps, learning rate and batch size.
    """

    def __init__(self, block: DecoderBlock, objective: Objective, plan: BlockPlan) -> None:
        super().__init__()
        self.block = block
        self.objective = objective
        self.plan = plan

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """The frozen head, if the objective lives in logit space."""

    @abstractmethod
    def readout(self, hidden: Tensor) -> Tensor:
        """Map the block's output (…, D) to where the objective compares."""

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the objective's loss of the block's outputs `hidden` (B, T, D) for the batch they came from."""
        return self.objective.loss(self.readout(hidden), batch["target"], batch["mask"], self.head)

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor | None:
        """Return the batch's loss; None, which Lightning skips, if the block has nothing to train."""
        loss = self.loss(self.block(batch["inputs"]), batch)
        return loss if loss.requires_grad else None

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        return self.loss(self.block(batch["inputs"]), batch)

    def configure_optimizers(self) -> Any:
        """Adam with a cosine to 0 over the plan's steps; None if the block has nothing to train."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            return None
        optimizer = torch.optim.Adam(parameters, lr=self.plan.lr)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.plan.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
