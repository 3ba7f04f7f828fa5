"""Sums of outer products: Hessians of layers, the head's Gram matrix."""

import torch
from torch import Tensor


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add Σ rowᵀ·row of `rows` (M, D) to `total` (D, D) in place, in the dtype of `total`, autocast or not."""
    rows = rows.to(total.dtype)
    with torch.autocast(total.device.type, enabled=False):  # bf16 sums broke GPTQ's Cholesky
        total.addmm_(rows.T, rows)
