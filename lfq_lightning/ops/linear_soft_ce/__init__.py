"""Cross-entropy of a linear head against soft targets, without logits."""

from lfq_lightning.ops.linear_soft_ce.loss import linear_soft_ce, logit_mean, logit_moment

__all__ = ["linear_soft_ce", "logit_mean", "logit_moment"]
