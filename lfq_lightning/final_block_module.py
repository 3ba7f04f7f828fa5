"""FinalBlockModule: a block seen through the final norm and the LM head."""

from typing import final

from torch import Tensor

from lfq_lightning.calibration_block import CalibrationBlock
from lfq_lightning.decoder_block import DecoderBlock
from lfq_lightning.head import Head
from lfq_lightning.objectives import Objective
from lfq_lightning.plan import BlockPlan


@final
class FinalBlockModule(CalibrationBlock):
    """The final decoder layer + final norm + LM head, calibrated on token distributions (LFQ, section 3).

    The head stays frozen and in full precision. On an earlier block the same module compares what the head would read
    there (the logit lens).
    """

    def __init__(self, block: DecoderBlock, objective: Objective, plan: BlockPlan, head: Head) -> None:
        super().__init__(block, objective, plan)
        self._head = head

    @property
    def head(self) -> Head:
        return self._head

    def readout(self, hidden: Tensor) -> Tensor:
        return self.head.readout(hidden)
