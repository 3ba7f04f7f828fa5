"""GPTQ: error-compensating rounding with second-order information."""

import logging
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.grids import Grid, IntegerGrid
from lfq_lightning.grids.search_scale import search_scale
from lfq_lightning.ops.gptq_solve import round_columns
from lfq_lightning.ops.gram import add_gram, add_products
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, ClosedFormQuantizer

log = logging.getLogger(__name__)

_MOST_DAMPING = 1.0  # of the mean diagonal; past that the Hessian says nothing


@QUANTIZERS.register
class GPTQ(ClosedFormQuantizer):
    """GPTQ with an fp32 Hessian, act-order without run-time cost, and a search of the scales.

    Columns are rounded one by one, those with the largest inputs first; the error of each is spread over the columns
    still to come, through the inverse Hessian of the layer's inputs.

    Args:
        damp: added to the Hessian's diagonal, as a share of its mean; grown tenfold until the Cholesky succeeds.
        act_order: `static` rounds the columns in order of decreasing Hessian diagonal, on grids found beforehand;
            `group` takes the groups in that order, and finds each group's grid when it is reached, on the weights as
            compensated by then (GPTQModel's group-aware order); `none` keeps the order of the columns.
        ratios: shrink factors tried per group in the search of the scale.
        scale_by: what the search measures rounding errors by: the `weight`, or each weight's share of the output by the
            Hessian's `diagonal`.
        correct: which share of the quantised prefix's error the layer corrects, 0 … 1. The weight W that is rounded
            becomes W + correct · W Σ(x_fp - x)xᵀ H⁻¹; at 1 its outputs on x are the closest to W x_fp. That is the
            asymmetric calibration of GPTAQ (arXiv 2504.02692, section 4), solved before the columns instead of between
            them.
    """

    paper = "GPTQ (arXiv 2210.17323), section 3 and algorithm 1"
    needs_inputs = True

    def __init__(
        self,
        weight: Tensor,
        scheme: Grid,
        scale_dtype: torch.dtype,
        *,
        damp: float = 0.01,
        act_order: Literal["static", "group", "none"] = "static",
        ratios: int = 20,
        scale_by: Literal["weight", "diagonal"] = "weight",
        correct: float = 0.0,
    ) -> None:
        super().__init__(weight, scheme, scale_dtype)
        self.damp = damp
        self.act_order = act_order
        self.ratios = ratios
        self.scale_by = scale_by
        self.correct = correct
        in_features = weight.shape[1]
        self.hessian = torch.zeros(in_features, in_features, dtype=torch.float32, device=weight.device)
        self.shift = torch.zeros_like(self.hessian) if correct else None  # Σ (x_fp - x) xᵀ

    @classmethod
    def check(cls, scheme: Grid, options: dict[str, Any]) -> None:
        cls.check_counts(options, "ratios")
        if not 0 < options["damp"] <= _MOST_DAMPING:
            raise UserError(f"quantizer gptq: damp {options['damp']} must be above 0 and at most {_MOST_DAMPING:g}.")
        if options["act_order"] == "group" and scheme.unit != scheme.group_size:
            raise UserError(
                f"quantizer gptq: act_order group finds the grids of groups one by one, and {scheme} stores several "
                "together; use static."
            )
        if not 0 <= options["correct"] <= 1:
            raise UserError(f"quantizer gptq: correct {options['correct']} must be between 0 and 1.")

    @classmethod
    def needs_reference(cls, options: dict[str, Any]) -> bool:
        return bool(options.get("correct"))

    def observe(self, inputs: Tensor) -> None:
        add_gram(self.hessian, inputs)

    def statistics(self) -> list[Tensor]:
        return [self.hessian] if self.shift is None else [self.hessian, self.shift]

    def observe_reference(self, inputs: Tensor, reference: Tensor) -> None:
        assert self.shift is not None
        add_products(self.shift, reference.float() - inputs.float(), inputs)

    def solve(self) -> None:
        (rows, columns), size = self.weight.shape, self.scheme.group_of(self.weight.shape[1])
        diagonal = self.hessian.diagonal().clone()  # no view: the Hessian is released below
        importance = diagonal if self.scale_by == "diagonal" else None
        order = _order(diagonal, size, self.act_order)
        back = torch.argsort(order)
        factor = self._inverse_factor(order)
        weight = self._corrected(factor, back)
        # Rows are columns of the weight here: each step then reads contiguous memory.
        work = weight.T[order].contiguous()
        scale, zero = (value.float()[:, :, 0].T[order // size] for value in self._grid(weight, size, importance))
        codes, latent, errors = torch.empty_like(work), torch.empty_like(work), torch.empty_like(work)
        with torch.autocast(self.weight.device.type, enabled=False):
            step = size if self.act_order == "group" else columns
            for low in range(0, columns, step):
                span = slice(low, low + step)
                if self.act_order == "group":
                    part = None if importance is None else importance[order[span]]
                    grid = self._grid(work[span].T.contiguous(), size, part)
                    scale[span], zero[span] = (value.float().view(1, rows) for value in grid)
                whole, minimum, book = self.scheme.levels.as_columns(zero[span])
                if minimum is not None:
                    work[span] += minimum
                arguments = (work[span], factor[span, span], scale[span], whole, self.scheme.max_code)
                round_columns(*arguments, codes[span], latent[span], errors[span], book)
                if minimum is not None:
                    latent[span] -= minimum
                work[low + step :].addmm_(factor[span, low + step :].T, errors[span], alpha=-1)
        scale, zero = (value[back].view(-1, size, rows)[:, 0].T[:, :, None].contiguous() for value in (scale, zero))
        self.scale, self.zero_point = self.scheme.stored(scale, zero, self.scale_dtype)
        self.codes = codes[back].T.contiguous()
        self._latent = latent[back].T.contiguous()
        del self.shift

    @classmethod
    def solve_bytes(cls, rows: int, columns: int) -> int:
        return 4 * (7 * columns**2 + 11 * rows * columns)

    @classmethod
    def solve_work(cls, rows: int, columns: int) -> tuple[float, float]:
        return 1.0 * rows * columns**2 + columns**3, 2500.0 * rows * columns

    def _corrected(self, factor: Tensor, back: Tensor) -> Tensor:
        """Return the weight (O, I) to round; `factor` is in processing order, which `back` undoes."""
        if self.shift is None:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            inverse = (factor.T @ factor)[back][:, back]
            return self.weight + self.correct * (self.weight @ self.shift @ inverse)

    def _grid(self, weight: Tensor, group_size: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        grid = self.scheme
        if isinstance(grid, IntegerGrid):
            grid = replace(grid, group_size=group_size)  # also where the weight is one group of a row
        return search_scale(weight, grid, self.scale_dtype, self.ratios, hessian=importance)

    @property
    def latent(self) -> Tensor:
        return self._latent

    def export(self) -> QuantizedTensor:
        return self.quantized(self.codes, self.scale, self.zero_point)

    def _inverse_factor(self, order: Tensor) -> Tensor:
        """Return the upper Cholesky factor U of the inverse Hessian (I, I), H⁻¹ = UᵀU, in processing order.

        The Hessian is released: five matrices of its size are held at once.
        """
        hessian = self.hessian[order][:, order]
        del self.hessian
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1.0  # an input that is always 0: its column is rounded to nearest, alone
        mean, damp = diagonal.mean(), self.damp
        while damp <= _MOST_DAMPING:
            damped = hessian.clone()
            damped.diagonal().add_(damp * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            del damped
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed and bool(upper.isfinite().all()):
                    return upper
            log.warning("GPTQ: the Hessian is not positive definite with damping %g; trying %g.", damp, 10 * damp)
            damp *= 10
        raise ArithmeticError("the Hessian stays indefinite at full damping: the inputs hold huge or broken values")


def _order(diagonal: Tensor, group_size: int, act_order: str) -> Tensor:
    """Return the columns in the order in which they are rounded."""
    if act_order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if act_order == "static":
        return torch.argsort(diagonal, descending=True, stable=True)
    grouped = diagonal.view(-1, group_size)
    groups = torch.argsort(grouped.sum(1), descending=True, stable=True)
    inside = torch.argsort(grouped, descending=True, stable=True)
    return (inside + torch.arange(len(grouped), device=diagonal.device)[:, None] * group_size)[groups].flatten()
