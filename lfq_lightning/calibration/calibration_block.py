"""CalibrationBlock: what BlockModule and FinalBlockModule share: a block's training by its objective."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lfq_lightning.calibration.activation_cache import Batch
from lfq_lightning.errors import UserError
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.head import Head
from lfq_lightning.objectives import Objective
from lfq_lightning.optimizers import OPTIMIZERS
from lfq_lightning.quantizers import LearnedQuantizer
from lfq_lightning.stages import BlockPlan


class CalibrationBlock(LightningModule, ABC):
    """The student of one block.

    Args:
        block: the decoder block; its linear layers are quantised, or still full precision before `solve`.
        objective: what training minimises and held-out selection compares.
        plan: steps, learning rate, batch size and optimizer.
        clips: the Trainer clips gradients.
    """

    def __init__(self, block: DecoderBlock, objective: Objective, plan: BlockPlan, clips: bool = False) -> None:
        super().__init__()
        self.block = block
        self.objective = objective
        self.plan = plan
        self.clips = clips

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """The frozen head, if the objective lives in logit space."""

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the objective's loss of the block's outputs `hidden` (B, T, D) for the batch they came from."""
        return self.objective.loss(hidden, batch["target"], batch["kept"], self.head)

    def quantizers(self) -> list[LearnedQuantizer]:
        """Return what is trained."""
        return [module for module in self.modules() if isinstance(module, LearnedQuantizer)]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the block's outputs (B, T, D) and their loss. All use of a sharded block goes through here."""
        hidden = self.block(batch["inputs"])
        return hidden, self.loss(self.block.hidden_states(hidden), batch)

    def training_step(self, batch: Batch, step: int = 0) -> Tensor:
        """Return the loss at an optimizer step; its mean over ranks is that of the whole batch."""
        for quantizer in self.quantizers():
            quantizer.anneal(step / self.plan.steps)
        loss = self(batch)[1]
        if not loss.requires_grad:
            raise UserError(
                f"objective {self.plan.objective.name}: its loss has no gradient; compute it from the block's outputs."
            )
        return loss * batch["weight"]

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        return self(batch)[1]

    def configure_optimizers(self) -> Any:
        """The plan's optimizer over all learned quantizers; None if the block has nothing to train."""
        groups: dict[float, list[nn.Parameter]] = {}
        for quantizer in self.quantizers():
            for name, parameter in quantizer.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(self.plan.lr * quantizer.rates.get(name, 1.0), []).append(parameter)
        if not groups:
            return None
        listed = [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]
        optimizer, schedule = OPTIMIZERS[self.plan.optimizer].build(listed, self.plan.steps, not self.clips)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
