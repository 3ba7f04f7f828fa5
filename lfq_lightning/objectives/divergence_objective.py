"""What objectives share that compare whole rows of logits."""

from abc import abstractmethod

from torch import Tensor

from lfq_lightning.head import Head
from lfq_lightning.objectives.objective import Objective
from lfq_lightning.ops.logit_divergence import logit_divergence


class DivergenceObjective(Objective):
    """Base of objectives that are a function of the student's and the teacher's logits and know no shorter way."""

    logit_space = True

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        return {"readout": hidden}

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        return logit_divergence(hidden, target["readout"], head.weight, self.divergence)

    @abstractmethod
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the losses (m,) of logits (m, V), differentiable in the student's."""
