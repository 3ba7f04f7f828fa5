"""The LFQ objective: soft-target cross-entropy of the token distributions."""

from lfq_lightning.objectives import OBJECTIVES, SoftTargetObjective


@OBJECTIVES.register
class LogitCE(SoftTargetObjective):
    """LFQ: cross-entropy between the teacher's and the student's token distributions, over the whole vocabulary.

    The teacher is the full-precision model on its own prefix, the student the quantised one on the quantised prefix.
    """

    paper = "LFQ (arXiv 2605.29756, ICML 2026); the loss by the identity of ops/linear_soft_ce"
    minus_entropy = False
