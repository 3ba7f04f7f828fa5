"""AWQ: activation-aware scaling of the inputs, and a clip search."""

from typing import Any

import torch
from torch import Tensor

from lfq_lightning.grids import Grid, IntegerGrid
from lfq_lightning.grids.round_to_nearest import round_to_nearest
from lfq_lightning.grids.search_scale import search_scale
from lfq_lightning.ops.gram import add_gram
from lfq_lightning.quantizers import QUANTIZERS, NearestQuantizer

_SEARCH_RATIOS = 1  # scalings are compared on plain min-max grids


@QUANTIZERS.register
class AWQ(NearestQuantizer):
    """AWQ: input channels with large activations are scaled up before rounding to nearest, and ranges are clipped.

    The scale of a channel is mean|x|^r / mean|w|^(1-r), w relative to its group's largest ("duo scaling"), with the r
    of a grid that makes the least error in the layer's output; it is folded into the norm or layer before
    (families.py), so the model's function stays. Then each group's range is shrunk to what makes the least error in its
    share of the output. Both errors come from the Hessian Σxxᵀ, so no activations are kept. Where a scale is folded,
    inputs are those of the block in full precision, as in the authors' code: layers do not wait for those before them.

    Args:
        exponents: exponents r tried, evenly spaced from 0 to below 1 (and no scaling at all).
        clip: ranges tried per group, shrunk by as much as a half; 1 is plain min-max. On an asymmetric grid of 2 bits
            half as many, each with both zero points it lies between. The authors leave q and k unclipped.
    """

    paper = "AWQ (arXiv 2306.00978), section 3.2, equations 4 and 5; duo scaling and clipping from its code"
    needs_inputs = True
    scales_inputs = True

    def __init__(
        self, weight: Tensor, scheme: Grid, scale_dtype: torch.dtype, *, exponents: int = 20, clip: int = 20
    ) -> None:
        super().__init__(weight, scheme, scale_dtype)
        self.exponents = exponents
        self.clip = clip
        width = weight.shape[1]
        self.hessian = torch.zeros(width, width, dtype=torch.float32, device=weight.device)
        self.activation = torch.zeros(width, dtype=torch.float32, device=weight.device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=weight.device)

    @classmethod
    def check(cls, scheme: Grid, options: dict[str, Any]) -> None:
        cls.check_counts(options, "exponents", "clip")

    def observe(self, inputs: Tensor) -> None:
        inputs = inputs.float()
        add_gram(self.hessian, inputs)
        self.activation += inputs.abs().sum(0)
        self.tokens += len(inputs)

    @classmethod
    def solve_bytes(cls, rows: int, columns: int) -> int:
        return 4 * (columns**2 + 5 * rows * columns)

    @classmethod
    def solve_work(cls, rows: int, columns: int) -> tuple[float, float]:
        return 43.0 * rows * columns**2, 7600.0 * rows * columns  # a scale for each candidate of s

    def statistics(self) -> list[Tensor]:
        return [self.hessian, self.activation, self.tokens]

    def input_scale(self) -> Tensor:
        grouped = self.weight.abs().view(len(self.weight), -1, self.scheme.group_of(self.weight.shape[1]))
        relative = grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-6)
        weight, activation = relative.mean(0).flatten() + 1e-4, (self.activation / self.tokens).clamp(min=1e-4)
        best_scale = torch.ones_like(activation)
        best_error = self._error(best_scale)
        for number in range(self.exponents):
            r = number / self.exponents
            scale = (activation**r / weight ** (1 - r)).clamp(min=1e-4)
            scale /= (scale.amax() * scale.amin()).sqrt()
            error = self._error(scale)
            if error < best_error:
                best_scale, best_error = scale, error
        return best_scale

    def divide_inputs(self, scale: Tensor) -> bool:
        self.hessian /= scale[:, None] * scale
        self.activation /= scale
        return True

    def solve(self) -> None:
        width = self.scheme.group_of(self.weight.shape[1])
        groups = self.weight.shape[1] // width
        blocks = self.hessian.view(groups, width, groups, width).diagonal(dim1=0, dim2=2)
        hessian = blocks.permute(2, 0, 1).contiguous()
        # with four levels, on which side of zero there are two of them matters as much as how wide they stand
        whole_zeros = isinstance(self.scheme, IntegerGrid) and not self.scheme.symmetric
        coarse = self.scheme.num_bits == 2 and whole_zeros and self.clip > 1
        ratios = max(2, self.clip // 2) if coarse else self.clip
        grids = [
            search_scale(self.weight, self.scheme, self.scale_dtype, ratios, hessian=h, both_zeros=coarse)
            for h in (hessian, None)
        ]
        by_output, by_weight = (self._errors(self.weight, *grid) for grid in grids)
        better = (by_output <= by_weight)[:, None, None]  # groups were searched one by one: their sum decides
        self.scale, self.zero_point = (torch.where(better, a, b) for a, b in zip(*grids, strict=True))

    def _error(self, input_scale: Tensor) -> float:
        scaled = self.weight * input_scale
        grid = search_scale(scaled, self.scheme, self.scale_dtype, _SEARCH_RATIOS)
        return float(self._errors(scaled, *grid, input_scale).sum())

    def _errors(self, weight: Tensor, scale: Tensor, zero: Tensor, input_scale: Tensor | None = None) -> Tensor:
        """Return each row's squared output error, Σ (e x)² = e H eᵀ, of rounding a weight, scaled or not: (O,)."""
        codes = round_to_nearest(weight, scale, zero, self.scheme).view(*scale.shape[:2], -1)
        errors = self.scheme.levels.value(codes, scale.float(), zero.float()).flatten(1) - weight
        if input_scale is not None:
            errors = errors / input_scale
        with torch.autocast(errors.device.type, enabled=False):
            return ((errors @ self.hessian) * errors).sum(1)
