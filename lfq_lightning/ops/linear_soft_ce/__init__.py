"""Cross-entropy of a linear head against soft targets, without logits."""

from lfq_lightning.ops.linear_soft_ce.loss import (
    covering,
    linear_soft_ce,
    log_sum_exp,
    logit_mean,
    logit_moment,
)

__all__ = ["covering", "linear_soft_ce", "log_sum_exp", "logit_mean", "logit_moment"]
