"""Search the scale (and zero point) of each group of a weight by the error of its rounding."""

import torch
from torch import Tensor

from lfq_lightning.quant_scheme import QuantScheme

_AT_ONCE = 2**18  # weights looked at together: the working set stays in the processor's cache
_AT_ONCE_ON_GPU = 2**25  # there launches must be few


def search_scale(
    weight: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    ratios: int,
    hessian: Tensor | None = None,
    both_zeros: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the scale (O, G, 1) in `scale_dtype` and the zero point (O, G, 1) uint8 with the least error.

    Candidates shrink the range of each group by `ratios` factors from 1 down to a half; a symmetric grid has one
    more negative level than positive ones, so both signs of the scale are tried.

    Args:
        weight: (O, I) fp32.
        ratios: number of shrink factors, at least 1 (1 is plain min-max).
        hessian: what the rounding errors e of a group are measured by: nothing, Σe²; a diagonal (I,), Σh·e²; or blocks
            (G, K, K), eᵀHe, which with H = Σxxᵀ is the error of the group's share of the output.
        both_zeros: of an asymmetric grid, try the zero point below what the range asks for and the one above, not the
            nearer one only.
    """
    o, i = weight.shape
    grouped = weight.reshape(o, -1, scheme.group_of(i))
    if hessian is not None and hessian.dim() == 1:
        hessian = hessian.view(grouped.shape[1], -1)
    scale = torch.empty(*grouped.shape[:2], 1, dtype=scale_dtype, device=weight.device)
    zero_point = torch.empty_like(scale, dtype=torch.uint8)
    rows = max(1, (_AT_ONCE_ON_GPU if weight.is_cuda else _AT_ONCE) // i)
    for start in range(0, o, rows):
        part = slice(start, start + rows)
        scale[part], zero_point[part] = _search(grouped[part], scheme, scale_dtype, ratios, hessian, both_zeros)
    return scale, zero_point


def _search(
    grouped: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    ratios: int,
    hessian: Tensor | None,
    both_zeros: bool,
) -> tuple[Tensor, Tensor]:
    low = grouped.amin(-1, keepdim=True).clamp(max=0.0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0.0)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.full_like(low, float(scheme.middle_code))
    for ratio in torch.linspace(1.0, 0.5, ratios).tolist():
        for scale, zero in _candidates(low, high, scheme, scale_dtype, ratio, both_zeros):
            codes = (grouped / scale).round_().add_(zero).clamp_(0, scheme.max_code)
            error = _size(codes.sub_(zero).mul_(scale).sub_(grouped), hessian)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale.to(scale_dtype), best_zero.to(torch.uint8)


def _size(errors: Tensor, hessian: Tensor | None) -> Tensor:
    """Return what errors (O, G, K) amount to, (O, G, 1)."""
    if hessian is None:
        return errors.square_().sum(-1, keepdim=True)
    if hessian.dim() == 2:
        return errors.square_().mul_(hessian).sum(-1, keepdim=True)
    with torch.autocast(errors.device.type, enabled=False):
        through = torch.bmm(errors.transpose(0, 1), hessian).transpose(0, 1)
    return (through * errors).sum(-1, keepdim=True)


def _candidates(
    low: Tensor, high: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, ratio: float, both_zeros: bool
) -> list[tuple[Tensor, Tensor]]:
    if scheme.symmetric:
        largest = torch.maximum(-low, high)
        zero = torch.full_like(low, float(scheme.middle_code))
        scale = _shippable(largest * (ratio / (scheme.middle_code - 0.5)), scale_dtype)
        return [(scale, zero), (-scale, zero)]
    scale = _shippable((high - low) * (ratio / scheme.max_code), scale_dtype)
    exact = -low * ratio / scale
    zeros = [exact.floor(), exact.ceil()] if both_zeros else [exact.round()]
    return [(scale, zero.clamp(0, scheme.max_code)) for zero in zeros]


def _shippable(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round to the dtype that ships; a group of zeros gets scale 1."""
    rounded = scale.to(scale_dtype).float()
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))
