"""What an objective is: what the teacher leaves behind per token, and the student's loss against it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

from torch import Tensor, nn

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.models.head import Head
from lfq_lightning.registry import plugin_name

Rows = Callable[[], Iterator[Tensor]]  # each call yields (M, D) anew


class Objective(nn.Module, ABC):
    """Base of all objectives. Options are the keyword-only parameters of the constructor, each with a default.

    Hidden states are those of the block's output; with `logit_space = True` they come through the final norm first
    (`Head.readout`), the block is a FinalBlockModule, and `head` is the frozen head. Otherwise `head` is None.
    """

    paper: ClassVar[str]
    logit_space: bool = False
    matches_teacher: ClassVar[bool] = True  # the teacher itself is a minimum
    linear_head_only: bool = False  # it cannot do with soft-capped logits
    head_share: float = 1.0  # about how much of the head's products a step needs, for `lfq plan`

    def view(self, hidden: Tensor, head: Head | None) -> Tensor:
        """Return the block's outputs (…, D) as this objective reads them."""
        if not self.logit_space:
            return hidden
        assert head is not None
        return head.readout(hidden)

    def prepare(self, rows: Rows, head: Head | None, ranks: Ranks) -> None:
        """Look at some of this rank's outputs of the teacher, as `view` reads them; called before any `target`."""

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        """Return what to keep of the teacher's `hidden` (M, D), one row per token; computed once and cached.

        Two things are kept anyway: `token_loss` finds the teacher's block output as `target["hidden"]`, and the id of
        the text's next token as `target["next_token"]` (token_set.NO_NEXT where there is none).
        """
        return {}

    @abstractmethod
    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        """Return the loss of each token (M,) of the student's `hidden` (M, D); the rows of `target` match."""

    def loss(self, hidden: Tensor, target: dict[str, Tensor], kept: Tensor, head: Head | None) -> Tensor:
        """Return the mean loss over tokens that are no pads, a scalar in fp32.

        Args:
            hidden: (B, T, D), the student's block outputs.
            target: tensors (B, T, …).
            kept: int64 (M,), their places among the B·T tokens. With a mask the host would wait while a GPU counts.

        Raises UserError if `token_loss` does not return one number per token.
        """
        rows = {name: value.flatten(0, 1).index_select(0, kept) for name, value in target.items()}
        seen = self.view(hidden.flatten(0, 1).index_select(0, kept), head)
        return self.checked_loss(seen, rows, head).float().mean()

    def checked_target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        """Return `target`. Raises UserError if it is no dict of tensors with a row per token."""
        kept = self.target(hidden, head)
        right = isinstance(kept, dict) and all(isinstance(v, Tensor) and len(v) == len(hidden) for v in kept.values())
        if not right:
            raise UserError(
                f"objective {plugin_name(type(self))}: target must return a dict of tensors, each with a row for each "
                f"of the {len(hidden)} tokens."
            )
        return kept

    def checked_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        """Return `token_loss`. Raises UserError if it is not one number per token."""
        return self.one_per_token(self.token_loss(hidden, target, head), len(hidden), "token_loss")

    def one_per_token(self, losses: object, tokens: int, method: str) -> Tensor:
        """Return what `method` has returned. Raises UserError if it is not one number per token."""
        if not isinstance(losses, Tensor) or losses.shape != (tokens,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(
                f"objective {plugin_name(type(self))}: {method} returned {got} for {tokens} tokens; return one loss "
                "per token."
            )
        return losses
