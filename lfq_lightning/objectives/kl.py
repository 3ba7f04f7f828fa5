"""Forward KL divergence of the token distributions."""

from lfq_lightning.objectives import OBJECTIVES, SoftTargetObjective


@OBJECTIVES.register
class KL(SoftTargetObjective):
    """KL(teacher ‖ student): the LFQ cross-entropy minus the teacher's entropy; same gradient, 0 at a perfect match."""

    paper = "LFQ (arXiv 2605.29756, ICML 2026): CE and KL differ by a constant"
    minus_entropy = True
