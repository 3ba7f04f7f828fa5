"""What a quantizer is: closed-form ones solve for the codes, learned ones train them from such a solution."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantized_tensor import QuantizedTensor


class Quantizer(nn.Module, ABC):
    """Base of all quantizers. Options are the keyword-only parameters of the constructor, each with a default."""

    paper: ClassVar[str]

    @abstractmethod
    def export(self) -> QuantizedTensor:
        """Return exactly what ships."""


class ClosedFormQuantizer(Quantizer):
    """Solves the codes of one weight, or of several with the same input stacked by rows; has no parameters.

    Args:
        weight: (O, I) fp32, full precision.
        scheme: the grid.
        scale_dtype: the dtype in which scales ship.
    """

    needs_inputs: ClassVar[bool] = False

    def __init__(self, weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.scheme = scheme
        self.scale_dtype = scale_dtype

    def observe(self, inputs: Tensor) -> None:  # noqa: B027 - not abstract: a data-free quantizer looks at nothing
        """Take in a batch of the weight's inputs (tokens, I), pads removed. Called only if `needs_inputs`."""

    @abstractmethod
    def solve(self) -> None:
        """Find the codes. Called once, after the last `observe`."""

    @property
    @abstractmethod
    def latent(self) -> Tensor:
        """Return the weight (O, I) fp32 whose rounding to nearest on the solved grid gives the solved codes."""

    def quantized(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> QuantizedTensor:
        """Wrap integer-valued `codes` (O, I) of any dtype."""
        return QuantizedTensor(codes.to(torch.uint8).contiguous(), scale, zero_point, self.scheme)


class LearnedQuantizer(Quantizer):
    """Trains the rounding of one weight by gradient, from the solution of a closed-form quantizer.

    The plan names that quantizer by `init`, an option of every learned quantizer. At step 0 `export()` equals `start`.

    Args:
        latent: (O, I) fp32, frozen; rounds to `start.codes` on the grid of `start`.
        start: the closed-form solution.
    """

    default_init: ClassVar[str] = "rtn"

    def __init__(self, latent: Tensor, start: QuantizedTensor) -> None:
        super().__init__()
        self.latent = nn.Parameter(latent, requires_grad=False)
        self.scheme = start.scheme
        self.scale_dtype = start.scale.dtype

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the fake-quantised weight (O, I) fp32, differentiable in the parameters."""
