"""Mean squared error of the block's output."""

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.models.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective


@OBJECTIVES.register
class MSE(Objective):
    """Squared error between the hidden states of student and teacher, mean over the hidden dimensions.

    A few tokens (often the first) carry activations a hundred and more times larger than others (massive activations,
    arXiv 2402.17762, section 2) and can outweigh all the rest; the options say what to do about them.

    Args:
        normalised: divide each token's error by the mean square of the teacher's hidden state.
        massive: tokens whose largest activation in the teacher exceeds this many times their median one (of absolute
            values) count as 0; 0 keeps all tokens.
    """

    paper = "block-wise reconstruction, BRECQ (arXiv 2102.05426), section 3.2; FlexRound (arXiv 2306.00317)"

    def __init__(self, *, normalised: bool = False, massive: float = 0.0) -> None:
        super().__init__()
        if massive != 0 and not massive > 1:
            raise UserError(f"objective mse: massive {massive} must be above 1, or 0 to keep all tokens.")
        self.normalised = normalised
        self.massive = massive

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        teacher = target["hidden"].to(wide)
        loss = (hidden.to(wide) - teacher).square().mean(-1)
        if self.normalised:
            loss = loss / teacher.square().mean(-1).clamp(min=1e-12)
        if self.massive:
            size = teacher.abs()
            loss = loss * (size.amax(-1) <= self.massive * size.median(-1).values)
        return loss
