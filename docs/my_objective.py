"""Cosine distance of the block's outputs: an objective of one's own."""

from torch.nn.functional import cosine_similarity

from lfq_lightning.objectives import OBJECTIVES, Objective


@OBJECTIVES.register
class Cosine(Objective):
    """One minus the cosine of student and teacher, to a power: directions count, lengths do not."""

    paper = "an example"

    def __init__(self, *, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def token_loss(self, hidden, target, head):
        return (1 - cosine_similarity(hidden, target["hidden"], dim=-1)) ** self.power
