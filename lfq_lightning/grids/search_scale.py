"""Search the scale (and the zero) of each group of a weight by the error of its rounding."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lfq_lightning.grids.grid import Grid, Pair

_AT_ONCE = 2**18  # weights looked at together: the working set stays in the processor's cache
_STEPS = 3  # to neighbours, of scales that are stored together
_AT_ONCE_ON_GPU = 2**25  # there launches must be few


def search_scale(
    weight: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    ratios: int,
    hessian: Tensor | None = None,
    both_zeros: bool = False,
) -> Pair:
    """Return the scale and the zero (O, G, 1) with the least error, in the dtypes of `grid.stored`.

    Candidates shrink the range of each group by `ratios` factors from 1 down to a half. Where scales are stored
    together, under one factor, the best of each group are rounded to that, and groups then try what lies beside.

    Args:
        weight: (O, I) fp32.
        ratios: number of shrink factors, at least 1 (1 is plain min-max).
        hessian: what the rounding errors e of a group are measured by: nothing, Σe²; a diagonal (I,), Σh·e²; or blocks
            (G, K, K), eᵀHe, which with H = Σxxᵀ is the error of the group's share of the output.
        both_zeros: of an asymmetric grid, try the zero point below what the range asks for and the one above, not the
            nearer one only.
    """
    o, i = weight.shape
    grouped = weight.reshape(o, -1, grid.group_of(i))
    if hessian is not None and hessian.dim() == 1:
        hessian = hessian.view(grouped.shape[1], -1)
    rows = max(1, (_AT_ONCE_ON_GPU if weight.is_cuda else _AT_ONCE) // i)
    parts = [_search(part, grid, scale_dtype, ratios, hessian, both_zeros) for part in grouped.split(rows)]
    scale, zero = (torch.cat(values) for values in zip(*parts, strict=True))
    return grid.stored(scale, zero, scale_dtype)


def _search(
    grouped: Tensor, grid: Grid, scale_dtype: torch.dtype, ratios: int, hessian: Tensor | None, both_zeros: bool
) -> Pair:
    low = grouped.amin(-1, keepdim=True).clamp(max=0.0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0.0)

    def better(pairs: Iterable[Pair], best: Pair, least: Tensor) -> tuple[Pair, Tensor]:
        for pair in pairs:
            error = _size(grid.levels.value(grid.levels.round(grouped, *pair), *pair).sub_(grouped), hessian)
            less = error < least
            best = torch.where(less, pair[0], best[0]), torch.where(less, pair[1], best[1])
            least = torch.where(less, error, least)
        return best, least

    factors = torch.linspace(1.0, 0.5, ratios).tolist()
    tried = (pair for ratio in factors for pair in grid.candidates(low, high, scale_dtype, ratio, both_zeros))
    first = next(tried)
    best, _ = better([first, *tried], first, torch.full_like(low, torch.inf))
    best = grid.ship(*best, scale_dtype)
    for _ in range(_STEPS):
        beside = grid.neighbours(*best)
        if not beside:
            break
        best, _ = better([best, *beside], best, torch.full_like(low, torch.inf))
    return best


def _size(errors: Tensor, hessian: Tensor | None) -> Tensor:
    """Return what errors (O, G, K) amount to, (O, G, 1)."""
    if hessian is None:
        return errors.square_().sum(-1, keepdim=True)
    if hessian.dim() == 2:
        return errors.square_().mul_(hessian).sum(-1, keepdim=True)
    with torch.autocast(errors.device.type, enabled=False):
        through = torch.bmm(errors.transpose(0, 1), hessian).transpose(0, 1)
    return (through * errors).sum(-1, keepdim=True)
