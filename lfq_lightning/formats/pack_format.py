"""PackFormat: how quantised weights lie in safetensors shards and in config.json."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.grids import Grid, IntegerGrid
from lfq_lightning.quantized_tensor import QuantizedTensor

Shape = tuple[int, ...]
Dtypes = tuple[torch.dtype, ...]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int32, torch.int64)


class PackFormat(ABC):
    """Base of all formats. `pack` and `unpack` are exact inverses, but for a scale that the format stores in fp16.

    Attributes:
        paper: where the format is specified.
        quant_method: its name in `quantization_config`.
        outer: which of `embeddings` and `head` it can hold quantised.
        scale_name: last part of the name of the tensor that holds a layer's scales; all others hold integers.
    """

    paper: ClassVar[str]
    quant_method: ClassVar[str]
    scale_name: ClassVar[str]
    outer: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def check(self, name: str, scheme: Grid, shape: tuple[int, int]) -> None:
        """Raise UserError, with the formats that can, if a layer (O, I) of that scheme cannot be held."""

    @abstractmethod
    def layout(self, scheme: Grid, shape: tuple[int, int]) -> dict[str, Shape]:
        """Return the tensors of one layer (O, I): last part of the name → shape. The first holds the codes."""

    @abstractmethod
    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return the stored tensors of the layer `name` by full name. Raises UserError for values it cannot hold."""

    @abstractmethod
    def unpack(self, name: str, tensors: dict[str, Tensor], scheme: Grid) -> QuantizedTensor:
        """Invert `pack`; `tensors` have the shapes of `layout`."""

    @abstractmethod
    def config(self, schemes: dict[str, Grid], dense: list[str]) -> dict[str, Any]:
        """Return the `quantization_config` of config.json; linear layers in `dense` stay as they are."""

    def settings(self, quantization: dict[str, Any]) -> dict[str, Any]:
        """Return what config.json says of quantisation, given what `config` has returned."""
        return {"quantization_config": quantization}

    @abstractmethod
    def schemes(self, config: dict[str, Any], layers: list[str]) -> dict[str, Grid]:
        """Read back the scheme of each of `layers`, those with packed tensors, from a `quantization_config`.

        Raises UserError for what this package cannot compute with, KeyError or TypeError for a damaged config.
        """

    @abstractmethod
    def engines(self, schemes: set[Grid]) -> list[str]:
        """Return which engines load a model of these schemes, and how."""

    @property
    def codes_name(self) -> str:
        """Last part of the name of the tensor that holds a layer's codes."""
        return next(iter(self.layout(IntegerGrid(), (32, 32))))

    def dtypes(self, scheme: Grid, last: str) -> Dtypes:
        """Return in which dtypes a tensor of `layout` may be stored."""
        return FLOATS if last == self.scale_name else _INTEGERS

    def dequantize(self, tensors: dict[str, Tensor], schemes: dict[str, Grid]) -> dict[str, Tensor]:
        """Return the weights that stored tensors stand for; packed layers in the dtype of their scales.

        Raises KeyError for a tensor that a layer of `schemes` lacks.
        """
        dense = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in schemes}
        biases = {name: tensor for name, tensor in tensors.items() if name.endswith(".bias")}
        weights = {f"{name}.weight": self.unpack(name, tensors, s).dequantize() for name, s in schemes.items()}
        return dense | biases | weights

    def packed_name(self, stored: str) -> str | None:
        """Return the layer whose codes the tensor `stored` holds, if it does."""
        layer, _, last = stored.rpartition(".")
        return layer if last == self.codes_name else None


def check_layout(
    packed: PackFormat, scheme: Grid, shape: tuple[int, int], name: str, tensors: dict[str, Tensor], source: object
) -> None:
    """Raise UserError naming `source` if a tensor of the layer `name` (O, I) is absent, or of another shape or kind of
    dtype than its format has for the scheme, or if a scale is not finite."""
    for last, wanted in packed.layout(scheme, shape).items():
        tensor = tensors.get(f"{name}.{last}")
        if tensor is None:
            raise UserError(f"{source} has no tensor {name}.{last}; copy the model again.")
        if tuple(tensor.shape) != wanted:
            raise UserError(
                f"{source}: {name}.{last} is {tuple(tensor.shape)}, but by config.json it would be {wanted}; config "
                "and shards do not belong together, copy the model again."
            )
        if tensor.dtype not in packed.dtypes(scheme, last):
            raise UserError(f"{source}: {name}.{last} is stored as {tensor.dtype}; copy the model again.")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(f"{source}: {name}.{last} holds NaN or infinity; copy the model again.")
