"""Mean squared error of the block's output."""

from torch import Tensor

from lfq_lightning.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective


@OBJECTIVES.register
class MSE(Objective):
    """Squared error between the hidden states of student and teacher, mean over the hidden dimensions."""

    paper = "block-wise reconstruction, BRECQ (arXiv 2102.05426), section 3.2; FlexRound (arXiv 2306.00317)"

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        return (hidden.float() - target["hidden"].float()).square().mean(-1)
