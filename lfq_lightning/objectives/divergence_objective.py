"""What objectives share that compare whole rows of logits."""

from abc import abstractmethod

from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.models.head import Head
from lfq_lightning.objectives.objective import Objective
from lfq_lightning.ops.logit_divergence import logit_divergence
from lfq_lightning.registry import plugin_name


class DivergenceObjective(Objective):
    """Base of objectives that are a function of the student's and the teacher's logits.

    Args:
        temperature: both rows of logits are divided by it; the loss is multiplied by its square, which keeps the size
            of the gradient (Hinton et al., arXiv 1503.02531, section 2).
    """

    logit_space = True

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"objective {plugin_name(type(self))}: temperature {temperature} must be positive.")
        self.temperature = temperature

    def target(self, hidden: Tensor, head: Head | None) -> dict[str, Tensor]:
        return {"readout": hidden}

    def token_loss(self, hidden: Tensor, target: dict[str, Tensor], head: Head | None) -> Tensor:
        assert head is not None
        return logit_divergence(hidden, target["readout"], head.weight, self._tempered, softcap=head.softcap)

    def _tempered(self, student: Tensor, teacher: Tensor) -> Tensor:
        losses = self.divergence(student / self.temperature, teacher / self.temperature)
        return self.one_per_token(losses, len(student), "divergence") * self.temperature**2

    @abstractmethod
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the losses (m,) of logits (m, V), differentiable in the student's."""
