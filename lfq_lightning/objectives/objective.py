"""What an objective is: what the teacher leaves behind per token, and the student's loss against it."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from lfq_lightning.head import Head


class Objective(nn.Module, ABC):
    """Base of all objectives. Options are the keyword-only parameters of the constructor, each with a default.

    Hidden states are those of the block's output; with `logit_space = True` they come through the final norm first
    (`Head.readout`), the block is a FinalBlockModule, and `head` is the frozen head. Otherwise `head` is None.
    """

    paper: ClassVar[str]
    logit_space: ClassVar[bool] = False

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        """Return what to keep of the teacher's `hidden` (M, D), one row per token; computed once and cached.

        The teacher's block output itself is kept anyway: `token_loss` finds it as `target["hidden"]`.
        """
        return {}

    @abstractmethod
    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        """Return the loss of each token (M,) of the student's `hidden` (M, D); the rows of `target` match."""

    def loss(self, hidden: Tensor, target: dict[str, Tensor], mask: Tensor, head: Head | None) -> Tensor:
        """Return the mean loss over unmasked tokens, a scalar in fp32.

        Args:
            hidden: (B, T, D), the student's.
            target: tensors (B, T, …).
            mask: bool (B, T), False at pads.
        """
        rows = {name: value[mask] for name, value in target.items()}
        return self.token_loss(hidden[mask], rows, head).float().mean()
