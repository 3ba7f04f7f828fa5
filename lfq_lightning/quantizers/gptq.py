"""GPTQ: error-compensating rounding with second-order information."""

import logging

import torch
from torch import Tensor

from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, ClosedFormQuantizer
from lfq_lightning.scale_search import search_scale

log = logging.getLogger(__name__)

_MOST_DAMPING = 1.0  # of the mean diagonal; past that the Hessian says nothing


@QUANTIZERS.register
class GPTQ(ClosedFormQuantizer):
    """GPTQ with an fp32 Hessian, act-order over static groups, and a scale search by squared error.

    Columns are rounded one by one, those with the largest inputs first; the error of each is spread over the columns
    still to come, through the inverse Hessian of the layer's inputs. Groups and scales are fixed beforehand (static
    groups), so act-order costs nothing at inference.

    Args:
        damp: added to the Hessian's diagonal, as a share of its mean; grown tenfold until the Cholesky succeeds.
        block_size: columns updated lazily together.
        act_order: round the columns in order of decreasing Hessian diagonal.
        ratios: shrink factors tried per group in the scale search.
    """

    paper = "GPTQ (arXiv 2210.17323), section 3 and algorithm 1"
    needs_inputs = True

    def __init__(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        *,
        damp: float = 0.01,
        block_size: int = 128,
        act_order: bool = True,
        ratios: int = 20,
    ) -> None:
        super().__init__(weight, scheme, scale_dtype)
        self.damp = damp
        self.block_size = block_size
        self.act_order = act_order
        self.ratios = ratios
        in_features = weight.shape[1]
        self.hessian = torch.zeros(in_features, in_features, dtype=torch.float32, device=weight.device)

    def observe(self, inputs: Tensor) -> None:
        inputs = inputs.float()
        with torch.autocast(inputs.device.type, enabled=False):  # bf16 sums broke the Cholesky
            self.hessian.addmm_(inputs.T, inputs)

    def solve(self) -> None:
        self.scale, self.zero_point = search_scale(self.weight, self.scheme, self.scale_dtype, self.ratios)
        order = self._order()
        factor = self._inverse_factor(order)
        # Rows are columns of the weight here: each step then reads contiguous memory.
        work = self.weight.T[order].contiguous()
        group = order // self.scheme.group_of(len(order))
        scale = self.scale.float()[:, :, 0].T[group]
        zero = self.zero_point.float()[:, :, 0].T[group]
        codes = torch.empty_like(work)
        latent = torch.empty_like(work)
        for start in range(0, len(order), self.block_size):
            block = slice(start, min(start + self.block_size, len(order)))
            errors = torch.empty_like(work[block])
            for j in range(block.start, block.stop):
                latent[j] = work[j]
                codes[j] = (work[j] / scale[j]).round_().add_(zero[j]).clamp_(0, self.scheme.max_code)
                error = (work[j] - (codes[j] - zero[j]) * scale[j]) / factor[j, j]
                work[j + 1 : block.stop].addr_(factor[j, j + 1 : block.stop], error, alpha=-1)
                errors[j - start] = error
            work[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
        back = torch.argsort(order)
        self.codes = codes[back].T.contiguous()
        self._latent = latent[back].T.contiguous()
        del self.hessian

    @property
    def latent(self) -> Tensor:
        return self._latent

    def export(self) -> QuantizedTensor:
        return self.quantized(self.codes, self.scale, self.zero_point)

    def _order(self) -> Tensor:
        diagonal = self.hessian.diagonal()
        if self.act_order:
            return torch.argsort(diagonal, descending=True, stable=True)
        return torch.arange(len(diagonal), device=diagonal.device)

    def _inverse_factor(self, order: Tensor) -> Tensor:
        """Return the upper Cholesky factor U of the inverse Hessian (I, I), H⁻¹ = UᵀU, in processing order."""
        hessian = self.hessian[order][:, order]
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1.0  # an input that is always 0: its column is rounded to nearest, alone
        mean, damp = diagonal.mean(), self.damp
        while damp <= _MOST_DAMPING:
            damped = hessian + torch.eye(len(order), device=hessian.device) * (damp * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed and bool(upper.isfinite().all()):
                    return upper
            log.warning("GPTQ: the Hessian is not positive definite with damping %g; trying %g.", damp, 10 * damp)
            damp *= 10
        raise ArithmeticError("the Hessian stays indefinite at full damping: the inputs hold huge or broken values")
