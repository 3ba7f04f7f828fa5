"""Scales for formats that store them in fp16."""

import logging

from torch import Tensor

from lfq_lightning.errors import UserError

log = logging.getLogger(__name__)


def half_scale(name: str, scale: Tensor) -> Tensor:
    """Return the scales of layer `name` in fp16; exact for fp16 ones, and for bf16 ones of 2⁻¹⁴ … 65504.

    One that vanishes makes its group zero, which is nearer to what it was than fp16 can tell; the log says so. Raises
    UserError if one overflows.
    """
    half = scale.half()
    if not bool(half.isfinite().all()):
        raise UserError(f"{name} has a scale beyond what fp16 holds; use compressed-tensors, which keeps its dtype.")
    if vanished := int(((half == 0) & (scale != 0)).sum()):
        log.warning("%s: %d scales are too small for fp16; their groups become zero", name, vanished)
    return half
