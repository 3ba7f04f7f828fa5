"""Quantise and dequantise a weight in training, with its gradients; on a GPU in one kernel each way."""

from torch import Tensor

from lfq_lightning.ops.fake_quant import reference
from lfq_lightning.ops.fake_quant.level_terms import LevelTerms
from lfq_lightning.ops.path import runs_triton

__all__ = ["LevelTerms", "codes", "fake_quantize", "level_tensor"]


def fake_quantize(levels: Tensor | LevelTerms, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Return (clip(round(levels) + zero, 0, max_code) - zero)·scale; straight through the round, not the clip.

    fp32 (O, G, K); terms on a GPU come in the autocast dtype if autocast is on, into which they would be cast next.

    Args:
        levels: (O, G, K), weights in units of the scale; or the terms they are the sum of.
        scale: (O, G, 1).
        zero: (O, G, 1), whole numbers.
        max_code: the largest code.
    """
    if isinstance(levels, LevelTerms) and runs_triton(scale.device):
        from lfq_lightning.ops.fake_quant import triton

        return triton.fake_quantize(levels, scale, zero, max_code)
    return reference.fake_quantize(level_tensor(levels, scale), scale, zero, max_code)


def codes(levels: Tensor | LevelTerms, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Return the codes of what `fake_quantize` returns: uint8 (O, G, K)."""
    if isinstance(levels, LevelTerms) and runs_triton(scale.device):
        from lfq_lightning.ops.fake_quant import triton

        return triton.codes(levels, scale, zero, max_code)
    return reference.codes(level_tensor(levels, scale), zero, max_code)


def level_tensor(levels: Tensor | LevelTerms, scale: Tensor) -> Tensor:
    """Return levels (O, G, K) as a tensor, on any device: the sum of their terms."""
    return reference.level_tensor(levels, scale) if isinstance(levels, LevelTerms) else levels
