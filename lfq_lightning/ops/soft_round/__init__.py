"""AdaRound's soft rounding of a weight in training, with its gradients; on a GPU one kernel each way."""

from torch import Tensor

from lfq_lightning.ops.path import runs_triton
from lfq_lightning.ops.soft_round import reference

__all__ = ["soft_round"]


def soft_round(position: Tensor, scale: Tensor, low: Tensor, zero: Tensor, sharpness: float, max_code: int) -> Tensor:
    """Return (clip(low + sigmoid(sharpness·position), 0, max_code) - zero)·scale; arguments: `reference.soft_round`.

    fp32 (O, G, K); on a GPU in the autocast dtype if autocast is on, into which it would be cast next.
    """
    if runs_triton(position.device):
        from lfq_lightning.ops.soft_round import triton

        return triton.soft_round(position, scale, low, zero, sharpness, max_code)
    return reference.soft_round(position, scale, low, zero, sharpness, max_code)
