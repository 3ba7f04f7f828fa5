"""Scales for formats that store them in fp16."""

import torch
from torch import Tensor

from lfq_lightning.errors import UserError


def half_scale(name: str, scale: Tensor) -> Tensor:
    """Return the scales of layer `name` in fp16; exact for fp16 ones, and for bf16 ones of 2⁻¹⁴ … 65504.

    Raises UserError if one overflows or vanishes.
    """
    half = scale.half()
    if not bool(half.isfinite().all()) or bool(((half == 0) & (scale != 0)).any()):
        raise UserError(f"{name} has a scale outside what fp16 holds; use compressed-tensors, which keeps its dtype.")
    return half.to(torch.float16)
