"""A weighted sum of objectives, written as a list in YAML."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.models.head import Head
from lfq_lightning.objectives.objective import Objective, Rows
from lfq_lightning.registry import Plugin


class WeightedSum(Objective):
    """Σ weight·objective over the terms; each reads the block's outputs its own way, hidden states or logits.

    Args:
        terms: objectives with their weights.
    """

    paper = "ours"

    def __init__(self, *, terms: tuple[tuple[Plugin[Objective], float], ...]) -> None:
        super().__init__()
        self.terms = [(plugin.build(), weight) for plugin, weight in terms]
        self.logit_space = any(term.logit_space for term, _ in self.terms)
        self.head_share = sum(term.head_share for term, _ in self.terms if term.logit_space)
        self.linear_head_only = any(term.linear_head_only for term, _ in self.terms)

    def view(self, hidden: Tensor, head: Head | None) -> Tensor:
        return hidden

    def prepare(self, rows: Rows, head: Head | None, ranks: Ranks) -> None:
        for term, _ in self.terms:
            term.prepare(partial(_viewed, term, rows, head), head, ranks)

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        return {
            f"{number}.{name}": value
            for number, (term, _) in enumerate(self.terms)
            for name, value in term.checked_target(term.view(hidden, head), head).items()
        }

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        common = {name: value for name, value in target.items() if "." not in name}
        losses = []
        for number, (term, weight) in enumerate(self.terms):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): v for name, v in target.items() if name.startswith(prefix)}
            losses.append(weight * term.checked_loss(term.view(hidden, head), common | own, head))
        return sum(losses[1:], losses[0])


def _viewed(term: Objective, rows: Rows, head: Head | None) -> Iterator[Tensor]:
    return (term.view(hidden, head) for hidden in rows())
