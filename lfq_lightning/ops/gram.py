"""Sums of outer products: Hessians of layers, the head's Gram matrix."""

import torch
from torch import Tensor


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add Σ rowᵀ·row of `rows` (M, D) to `total` (D, D) in place, in the dtype of `total`, autocast or not."""
    rows = rows.to(total.dtype)
    add_products(total, rows, rows)


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add Σ leftᵀ·right of rows (M, D) to `total` (D, D) in place, in the dtype of `total`, autocast or not."""
    with torch.autocast(total.device.type, enabled=False):  # bf16 sums broke GPTQ's Cholesky
        total.addmm_(left.to(total.dtype).T, right.to(total.dtype))
