"""compressed-tensors, `pack-quantized`: what vLLM and transformers read, and what a run writes."""

import re
from typing import Any

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.formats import FORMATS, PackFormat, Shape
from lfq_lightning.ops.bitstream import pack, unpack
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantized_tensor import QuantizedTensor


@FORMATS.register
class CompressedTensors(PackFormat):
    """2 … 8 bits, any group, symmetric and asymmetric; codes along the inputs, scales in the model's dtype."""

    paper = "compressed-tensors 0.18 and newer (dense 3-bit), compressors/pack_quantized"
    quant_method = "compressed-tensors"
    scale_name = "weight_scale"

    def check(self, name: str, scheme: QuantScheme, shape: tuple[int, int]) -> None:
        """Every scheme fits."""

    def layout(self, scheme: QuantScheme, shape: tuple[int, int]) -> dict[str, Shape]:
        (o, i), bits = shape, scheme.num_bits
        groups = i // scheme.group_of(i)
        found: dict[str, Shape] = {"weight_packed": (o, -(-i * bits // 32)), "weight_scale": (o, groups)}
        if not scheme.symmetric:
            found["weight_zero_point"] = (-(-o * bits // 32), groups)
        return {**found, "weight_shape": (2,)}

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
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

    def unpack(self, name: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        o, i = tensors[f"{name}.weight_shape"].tolist()
        codes = unpack(tensors[f"{name}.weight_packed"], scheme.num_bits, i)
        scale = tensors[f"{name}.weight_scale"][:, :, None].contiguous()
        if scheme.symmetric:
            zero_point = torch.full_like(scale, scheme.middle_code, dtype=torch.uint8)
        else:
            packed = tensors[f"{name}.weight_zero_point"].T.contiguous()
            zero_point = unpack(packed, scheme.num_bits, o).T[:, :, None].contiguous()
        return QuantizedTensor(codes, scale, zero_point, scheme)

    def config(self, schemes: dict[str, QuantScheme], dense: list[str]) -> dict[str, Any]:
        """A single scheme targets the class Linear, as engines expect it; several name their layers."""
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
            "quant_method": self.quant_method,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": dense,
            "config_groups": groups,
        }

    def schemes(self, config: dict[str, Any], layers: list[str]) -> dict[str, QuantScheme]:
        if config.get("format") != "pack-quantized":
            raise UserError(
                f"its compressed-tensors format is {config.get('format')!r}, and only pack-quantized is read here; "
                "load it with transformers or vLLM."
            )
        found: dict[str, QuantScheme] = {}
        for group in config["config_groups"].values():
            weights = group["weights"]
            _check_group(group, weights)
            size = weights["group_size"]
            scheme = QuantScheme(weights["num_bits"], -1 if size is None else size, weights["symmetric"])
            named = set(group["targets"])
            wider = [target for target in named if target == "Linear" or target.startswith("re:")]
            found |= {layer: scheme for layer in layers if layer in named or any(_matches(t, layer) for t in wider)}
        return found

    def engines(self, schemes: set[QuantScheme]) -> list[str]:
        symmetric = all(scheme.symmetric for scheme in schemes)
        widths = {scheme.num_bits for scheme in schemes}
        vllm = "vLLM (CUDA and CPU)" if widths == {4} else "vLLM (CUDA)"
        return ["transformers" if symmetric else "transformers (CompressedTensorsConfig(dequantize=True))", vllm]


def _matches(target: str, layer: str) -> bool:
    """Tell whether a target, the class Linear or `re:` and an expression, means a packed layer."""
    return target == "Linear" or re.match(target.removeprefix("re:"), layer) is not None


def _check_group(group: dict[str, Any], weights: dict[str, Any]) -> None:
    if group.get("input_activations") or group.get("output_activations"):
        raise UserError("its activations are quantised too, which is not computed here; load it with vLLM.")
    if weights.get("type", "int") != "int" or weights.get("actorder") not in (None, False, "static", "weight"):
        raise UserError(
            f"its weights are {weights.get('type')} with actorder {weights.get('actorder')!r}; only integers in plain "
            "groups are read here, load it with vLLM."
        )
