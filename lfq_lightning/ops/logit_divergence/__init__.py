"""Any divergence between the student's and the teacher's logits, a few tokens at a time."""

from lfq_lightning.ops.logit_divergence.reference import logit_divergence, soft_cap

__all__ = ["logit_divergence", "soft_cap"]
