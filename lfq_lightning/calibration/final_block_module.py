"""FinalBlockModule: the last block, or the last few, through the final norm and the LM head."""

from typing import final

from lfq_lightning.calibration.calibration_block import CalibrationBlock
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.head import Head
from lfq_lightning.objectives import Objective
from lfq_lightning.stages import BlockPlan


@final
class FinalBlockModule(CalibrationBlock):
    """The final decoder layers + final norm + LM head, calibrated on token distributions (LFQ, section 3).

    The head stays frozen and in full precision.
    """

    def __init__(
        self, block: DecoderBlock, objective: Objective, plan: BlockPlan, head: Head, clips: bool = False
    ) -> None:
        super().__init__(block, objective, plan, clips)
        self._head = head

    @property
    def head(self) -> Head:
        return self._head
