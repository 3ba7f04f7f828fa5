"""What a quantizer is: closed-form ones solve for codes, learned ones train them from such a solution, dense ones keep
real weights."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lfq_lightning.errors import UserError
from lfq_lightning.grids import Grid
from lfq_lightning.ops.fake_quant import LevelTerms
from lfq_lightning.ops.learned_grid import ship_through
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.registry import plugin_name


class Quantizer(nn.Module, ABC):
    """Base of all quantizers. Options are the keyword-only parameters of the constructor, each with a default."""

    paper: ClassVar[str]
    needs_inputs: ClassVar[bool] = False  # it solves from the layer's inputs
    scales_inputs: ClassVar[bool] = False  # it wants them scaled first

    @classmethod
    def check(cls, scheme: Grid, options: dict[str, Any]) -> None:
        """Raise UserError if this quantizer cannot hold the scheme, or an option is out of range."""

    @classmethod
    def check_counts(cls, options: dict[str, Any], *names: str) -> None:
        """Raise UserError unless these options are at least 1."""
        for name in names:
            if options[name] < 1:
                raise UserError(f"quantizer {plugin_name(cls)}: {name} {options[name]} must be at least 1.")

    @abstractmethod
    def export(self) -> QuantizedTensor | Tensor:
        """Return exactly what ships."""


class DenseQuantizer(Quantizer):
    """Data-free, and its result is no integer grid: the layer ships as a dense weight in the checkpoint's dtype.

    Args:
        weight: (O, I) fp32, full precision.
        scheme: what the user asked for; `check` has seen it.
    """

    def __init__(self, weight: Tensor, scheme: Grid) -> None:
        super().__init__()
        self.weight = weight
        self.scheme = scheme

    @abstractmethod
    def export(self) -> Tensor:
        """Return the weight (O, I) that the layer computes with."""


class ClosedFormQuantizer(Quantizer):
    """Solves the codes of one weight, or of several with the same input stacked by rows; has no parameters.

    Rows are solved apart from each other: each rank gets some of them.

    Args:
        weight: (O, I) fp32, full precision.
        scheme: the grid.
        scale_dtype: the dtype in which scales ship.
    """

    def __init__(self, weight: Tensor, scheme: Grid, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.scheme = scheme
        self.scale_dtype = scale_dtype

    @classmethod
    def needs_reference(cls, options: dict[str, Any]) -> bool:
        """Tell whether, with these options, it also wants the inputs that the layer has in the full-precision model."""
        return False

    @classmethod
    def solve_bytes(cls, rows: int, columns: int) -> int:
        """Return about how much memory `solve` takes for a weight of this shape, itself included, for `lfq plan`."""
        return 4 * 3 * rows * columns

    @classmethod
    def solve_work(cls, rows: int, columns: int) -> tuple[float, float]:
        """Return about how many FLOP of products `solve` takes, and bytes that its other operations read and write.

        Both for `lfq plan`. The search of a scale for each group, which most do, is 1700 bytes a weight.
        """
        return 0.0, 1700.0 * rows * columns

    def observe(self, inputs: Tensor) -> None:
        """Take in a batch of the weight's inputs (tokens, I), pads removed. Called only if `needs_inputs`."""

    def statistics(self) -> list[Tensor]:
        """Return the tensors that `observe` adds to: sums over tokens, which are also summed over ranks."""
        return []

    def observe_reference(self, inputs: Tensor, reference: Tensor) -> None:
        """Take in the same batch beside the full-precision model's (tokens, I). Called only if `needs_reference`."""
        raise NotImplementedError

    def input_scale(self) -> Tensor:
        """Return s (I,) fp32 > 0: quantising W·diag(s) for inputs x / s loses less than W for x.

        Called on a quantizer with `scales_inputs`, after the last `observe`; another one, of the scaled weight, solves.
        """
        raise NotImplementedError

    def divide_inputs(self, scale: Tensor) -> bool:
        """Make the `statistics` those of inputs divided by `scale` (I,), and return True; False: observe them anew.

        Called on a quantizer with `scales_inputs`, once its scale has been folded; the one that solves gets them.
        """
        return False

    @abstractmethod
    def solve(self) -> None:
        """Find the codes. Called once, after the last `observe`."""

    @abstractmethod
    def export(self) -> QuantizedTensor: ...

    @property
    @abstractmethod
    def latent(self) -> Tensor:
        """Return the weight (O, I) fp32 whose rounding to nearest on the solved grid gives the solved codes."""

    def quantized(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> QuantizedTensor:
        """Wrap integer-valued `codes` (O, I) of any dtype with their pair. Raises ValueError if one is NaN or off the
        grid."""
        if not bool(((codes >= 0) & (codes <= self.scheme.max_code)).all()):
            raise ValueError(f"some codes are NaN or lie outside 0 … {self.scheme.max_code}")
        return QuantizedTensor(codes.to(torch.uint8).contiguous(), scale, zero_point, self.scheme)


class LearnedQuantizer(Quantizer):
    """Trains the rounding of one weight by gradient, from the solution of a closed-form quantizer.

    A subclass says what is learned: the grid (scale and zero point), and the weight in units of the scale before it is
    rounded. In eval mode `forward()` is `export().dequantize()`; in training it may differ. The plan names the
    quantizer it starts from by `init`, an option of every learned quantizer; at step 0 `export()` equals `start`.
    `rates` are learning rates relative to the plan's, by parameter name; 1 if not in it.

    Args:
        latent: (O, I) fp32, frozen; rounds to `start.codes` on the grid of `start`.
        start: the closed-form solution.
    """

    default_init: ClassVar[str | dict[str, Any]] = "rtn"
    default_optimizer: ClassVar[str] = "adam"
    learns_positions: ClassVar[bool] = False  # from where weights lie between two levels, which codes do not tell
    rates: ClassVar[dict[str, float]] = {}

    def __init__(self, latent: Tensor, start: QuantizedTensor) -> None:
        super().__init__()
        self.scheme = start.scheme
        self.scale_dtype = start.scale.dtype
        self.latent = nn.Parameter(latent.view(len(latent), start.scale.shape[1], -1), requires_grad=False)
        self.start_scale = nn.Parameter(start.scale.float(), requires_grad=False)
        self.start_zero = nn.Parameter(start.zero_point.float(), requires_grad=False)

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the scale, already rounded to `scale_dtype`, and the zero point, a code; both fp32 (O, G, 1)."""

    @abstractmethod
    def levels(self, scale: Tensor) -> Tensor | LevelTerms:
        """Return what is rounded: the weight in units of the scale, (O, G, K).

        Any tensor will do; as LevelTerms, where they can say it, it is computed by one fused kernel on a GPU.
        """

    def scaled_grid(self, log_factor: Tensor, zero_shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the starting grid with its scale multiplied by exp(log_factor) and its zero point shifted."""
        return self.scheme.scaled(self.start_scale, self.start_zero, self.scale_dtype, log_factor.exp(), zero_shift)

    def stretched_grid(self, low: Tensor | None, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the start's grid with the least and the largest weight of each group multiplied by `low` and `high`.

        A symmetric grid has no `low`: its scale is multiplied by `high`.
        """
        return self.scheme.stretched(self.start_scale, self.start_zero, self.scale_dtype, low, high)

    def anneal(self, progress: float) -> None:
        """Take note of how far training is, from 0 at the first step to 1 after the last; called before each step."""

    @staticmethod
    def back_into(parameter: nn.Parameter, low: float, high: float) -> None:
        """Put a parameter back into its range, for `anneal`: a clamp in the graph alone would hold it outside."""
        with torch.no_grad():
            parameter.clamp_(low, high)

    def forward(self) -> Tensor:
        """Return the fake-quantised weight (O, I), differentiable in the parameters; fp32, or the autocast dtype.

        In eval mode its values are those of `export().dequantize()`, rounded to the dtype that ships.
        """
        scale, zero = self.grid()
        weight = self.scheme.levels.fake_quantize(self.levels(scale), scale, zero).flatten(1)
        return weight if self.training else ship_through(weight, self.scale_dtype)

    def export(self) -> QuantizedTensor:
        with torch.no_grad():
            scale, zero = self.grid()
            found = self.scheme.levels.codes(self.levels(scale), scale, zero).flatten(1)
        return QuantizedTensor(found, *self.scheme.stored(scale, zero, self.scale_dtype), self.scheme)
