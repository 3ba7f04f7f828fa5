"""What a Lightning precision means here: the dtype of products, and of the activation streams."""

import torch

from lfq_lightning.errors import UserError

_COMPUTE = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products under `Trainer(precision=…)`; UserError for one that harms rounding."""
    if precision not in _COMPUTE:
        raise UserError(
            f"trainer.precision: {precision} keeps no fp32 masters for learned rounding; use {', '.join(_COMPUTE)}."
        )
    return _COMPUTE[precision]


def stream_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which hidden states are kept between blocks: fp32, or bf16 where products are bf16."""
    return torch.bfloat16 if compute_dtype(precision) == torch.bfloat16 else torch.float32
