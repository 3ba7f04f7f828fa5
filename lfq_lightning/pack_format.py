"""PackFormat: quantised weights as tensors on disk, and back. compressed-tensors `pack-quantized`."""

from typing import Any

import torch
from torch import Tensor

from lfq_lightning.bitstream import pack, unpack
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantized_tensor import QuantizedTensor

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def pack_tensors(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """Return the stored tensors of the layer `name`: codes along the inputs, scales (O, G), the shape, zero points.

    Zero points stand only where the scheme is asymmetric, packed along the outputs: int32 (ceil(O·bits/32), G).
    """
    bits = quantized.scheme.num_bits
    tensors = {
        f"{name}.weight_packed": pack(quantized.codes, bits),
        f"{name}.weight_scale": quantized.scale[:, :, 0].contiguous(),
        f"{name}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    if not quantized.scheme.symmetric:
        packed = pack(quantized.zero_point[:, :, 0].T.contiguous(), bits)
        tensors[f"{name}.weight_zero_point"] = packed.T.contiguous()
    return tensors


def unpack_tensors(name: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Invert `pack_tensors`."""
    o, i = tensors[f"{name}.weight_shape"].tolist()
    codes = unpack(tensors[f"{name}.weight_packed"], scheme.num_bits, i)
    scale = tensors[f"{name}.weight_scale"][:, :, None].contiguous()
    if scheme.symmetric:
        zero_point = torch.full_like(scale, scheme.middle_code, dtype=torch.uint8)
    else:
        packed = tensors[f"{name}.weight_zero_point"].T.contiguous()
        zero_point = unpack(packed, scheme.num_bits, o).T[:, :, None].contiguous()
    return QuantizedTensor(codes, scale, zero_point, scheme)


def dequantized(stored: dict[str, Tensor], schemes: dict[str, QuantScheme]) -> dict[str, Tensor]:
    """Return the weights that stored tensors stand for: packed layers in the dtype of their scales, the rest as it is.

    Raises KeyError for a tensor that a layer of `schemes` lacks.
    """
    weights = {name: tensor for name, tensor in stored.items() if not name.endswith(SUFFIXES)}
    return weights | {f"{name}.weight": unpack_tensors(name, stored, s).dequantize() for name, s in schemes.items()}


def quantization_config(schemes: dict[str, QuantScheme], ignore: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json for layers with these schemes; `ignore` stay as they are.

    A single scheme targets the class Linear, as engines expect it; several name their layers.
    """
    kinds = sorted(set(schemes.values()), key=repr)
    groups = {}
    for number, scheme in enumerate(kinds):
        named = [name for name, other in schemes.items() if other == scheme]
        per_channel = scheme.group_size == -1
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else named,
            "weights": {
                "num_bits": scheme.num_bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if per_channel else "group",
                "group_size": None if per_channel else scheme.group_size,
                "dynamic": False,
            },
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": groups,
    }


def schemes_of(config: dict[str, Any], layers: list[str]) -> dict[str, QuantScheme]:
    """Read back the scheme of each quantised layer from a `quantization_config`."""
    found: dict[str, QuantScheme] = {}
    for group in config["config_groups"].values():
        weights = group["weights"]
        size = weights["group_size"]
        scheme = QuantScheme(weights["num_bits"], -1 if size is None else size, weights["symmetric"])
        named = layers if group["targets"] == ["Linear"] else group["targets"]
        found |= dict.fromkeys(named, scheme)
    return found
