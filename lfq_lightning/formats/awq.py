"""AWQ's `gemm` layout: 4-bit codes along the outputs, in an order made for a CUDA kernel."""

from typing import Any

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.formats import FORMATS, PackFormat, Shape
from lfq_lightning.formats.half_scale import half_scale
from lfq_lightning.grids import Grid, IntegerGrid
from lfq_lightning.ops.bitstream import pack, unpack
from lfq_lightning.quantized_tensor import QuantizedTensor

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this one of its eight outputs


@FORMATS.register
class AWQ(PackFormat):
    """4 bits only, one scheme for all layers; symmetric ones are stored with a zero point of 8."""

    paper = "AutoAWQ, version gemm"
    quant_method = "awq"
    scale_name = "scales"

    def check(self, name: str, scheme: Grid, shape: tuple[int, int]) -> None:
        if scheme.num_bits != 4:
            raise UserError(
                f"{name} has {scheme.num_bits} bits, but awq holds 4 only; use gptq_v2 (2, 3, 4, 8) or "
                "compressed-tensors (2 … 8)."
            )
        if shape[0] % 8:
            raise UserError(f"{name} has {shape[0]} outputs, but awq needs a multiple of 8; use compressed-tensors.")

    def layout(self, scheme: Grid, shape: tuple[int, int]) -> dict[str, Shape]:
        o, i = shape
        groups = i // scheme.group_of(i)
        return {"qweight": (i, o // 8), "qzeros": (groups, o // 8), "scales": (groups, o)}

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        return {
            f"{name}.qweight": _pack(quantized.codes),
            f"{name}.qzeros": _pack(quantized.zero_point[:, :, 0]),
            f"{name}.scales": half_scale(name, quantized.scale[:, :, 0].T).contiguous(),
        }

    def unpack(self, name: str, tensors: dict[str, Tensor], scheme: Grid) -> QuantizedTensor:
        return QuantizedTensor(
            _unpack(tensors[f"{name}.qweight"]),
            tensors[f"{name}.scales"].T[:, :, None].contiguous(),
            _unpack(tensors[f"{name}.qzeros"])[:, :, None].contiguous(),
            scheme,
        )

    def config(self, schemes: dict[str, Grid], dense: list[str]) -> dict[str, Any]:
        """Raises UserError for several schemes: the format has one for all layers."""
        kinds = set(schemes.values())
        if len(kinds) > 1:
            raise UserError(f"awq holds one scheme for all layers, but there are {len(kinds)}; use compressed-tensors.")
        (scheme,) = kinds
        return {
            "quant_method": self.quant_method,
            "bits": scheme.num_bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": dense,
        }

    def schemes(self, config: dict[str, Any], layers: list[str]) -> dict[str, Grid]:
        if config.get("version", "gemm").lower() != "gemm":
            raise UserError(f"its awq version is {config['version']!r}, and only gemm is read here; use vLLM.")
        return dict.fromkeys(layers, IntegerGrid(config["bits"], config["group_size"], symmetric=False))

    def engines(self, schemes: set[Grid]) -> list[str]:
        return ["vLLM (CUDA and CPU)", "GPTQModel", "transformers (with gptqmodel)"]


def _pack(values: Tensor) -> Tensor:
    """Pack values (O, C), 0 … 15, along the outputs: int32 (C, O / 8)."""
    columns = values.T.reshape(values.shape[1], -1, 8)
    return pack(columns[:, :, _ORDER].flatten(1), 4)


def _unpack(words: Tensor) -> Tensor:
    """Invert `_pack`."""
    columns = unpack(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return columns[:, :, torch.tensor(_ORDER).argsort()].flatten(1).T.contiguous()
