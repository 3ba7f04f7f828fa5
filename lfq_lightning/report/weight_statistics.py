"""Statistics of a layer as it ships: its scales, and how many weights lie at the ends of their range."""

import torch

from lfq_lightning.quantized_tensor import QuantizedTensor

_SHARES = (0.05, 0.5, 0.95)
_MOST = 2**20  # values whose quantiles are taken; of more, every n-th


def weight_statistics(quantized: QuantizedTensor) -> dict[str, float]:
    """Return 5, 50 and 95 % quantiles of the absolute scales, and the share of codes that are the least or largest.

    Many codes at the ends mean that the range is narrow: what lies beyond it is clipped.
    """
    scales = quantized.scale.abs().float().flatten()
    scales = scales[:: 1 + len(scales) // _MOST]
    low, middle, high = torch.quantile(scales, torch.tensor(_SHARES, device=scales.device)).tolist()
    codes, top = quantized.codes, quantized.scheme.max_code
    ends = ((codes == 0) | (codes == top)).float().mean().item()
    return {"scale_p05": low, "scale_p50": middle, "scale_p95": high, "at_ends": ends}
