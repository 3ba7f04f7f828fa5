"""compressed-tensors, `pack-quantized`: what vLLM and transformers read, and what a run writes."""

import re
from typing import Any

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.formats import FORMATS, Dtypes, PackFormat, Shape
from lfq_lightning.formats.named import grid_dtypes, pack_named, unpack_named
from lfq_lightning.grids import GRIDS, Grid, IntegerGrid, NamedGrid
from lfq_lightning.ops.bitstream import pack, unpack
from lfq_lightning.quantized_tensor import QuantizedTensor

_SCALE = "weight_scale"
_INTEGERS = "pack-quantized"
_FLOATS = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}  # and the grid


@FORMATS.register
class CompressedTensors(PackFormat):
    """Integers of 2 … 8 bits, any group, symmetric and asymmetric, scales in the model's dtype; NVFP4 and MXFP4."""

    paper = "compressed-tensors 0.18 and newer (dense 3-bit), compressors/pack_quantized"
    outer = frozenset({"head"})
    quant_method = "compressed-tensors"
    scale_name = _SCALE

    def check(self, name: str, scheme: Grid, shape: tuple[int, int]) -> None:
        """Every grid of its own fits."""

    def layout(self, scheme: Grid, shape: tuple[int, int]) -> dict[str, Shape]:
        if isinstance(scheme, NamedGrid):
            return {last: stored for last, (_, stored) in scheme.layout(shape).items()}
        (o, i), bits = shape, scheme.num_bits
        groups = i // scheme.group_of(i)
        found: dict[str, Shape] = {"weight_packed": (o, -(-i * bits // 32)), "weight_scale": (o, groups)}
        if not scheme.symmetric:
            found["weight_zero_point"] = (-(-o * bits // 32), groups)
        return {**found, "weight_shape": (2,)}

    def dtypes(self, scheme: Grid, last: str) -> Dtypes:
        return grid_dtypes(scheme, last) if isinstance(scheme, NamedGrid) else super().dtypes(scheme, last)

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        if isinstance(quantized.scheme, NamedGrid):
            return pack_named(name, quantized, quantized.scheme)
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

    def unpack(self, name: str, tensors: dict[str, Tensor], scheme: Grid) -> QuantizedTensor:
        if isinstance(scheme, NamedGrid):
            return unpack_named(name, tensors, scheme)
        o, i = tensors[f"{name}.weight_shape"].tolist()
        codes = unpack(tensors[f"{name}.weight_packed"], scheme.num_bits, i)
        scale = tensors[f"{name}.weight_scale"][:, :, None].contiguous()
        if scheme.symmetric:
            zero_point = torch.full_like(scale, 2 ** (scheme.num_bits - 1), dtype=torch.uint8)
        else:
            packed = tensors[f"{name}.weight_zero_point"].T.contiguous()
            zero_point = unpack(packed, scheme.num_bits, o).T[:, :, None].contiguous()
        return QuantizedTensor(codes, scale, zero_point, scheme)

    def config(self, schemes: dict[str, Grid], dense: list[str]) -> dict[str, Any]:
        """A single scheme targets the class Linear, as engines expect it; several name their layers."""
        kinds = sorted(set(schemes.values()), key=repr)
        layouts = {_layout_name(scheme) for scheme in kinds}
        groups: dict[str, dict[str, Any]] = {}
        for number, scheme in enumerate(kinds):
            named = [name for name, other in schemes.items() if other == scheme]
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if len(kinds) == 1 else named,
                "weights": _weights(scheme),
                **({"format": _layout_name(scheme)} if len(layouts) > 1 else {}),
            }
        return {
            "quant_method": self.quant_method,
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": dense,
            "config_groups": groups,
        }

    def schemes(self, config: dict[str, Any], layers: list[str]) -> dict[str, Grid]:
        found: dict[str, Grid] = {}
        for group in config["config_groups"].values():
            layout = config.get("format") if config.get("format") != "mixed-precision" else group.get("format")
            if layout not in (_INTEGERS, *_FLOATS):
                raise UserError(
                    f"its compressed-tensors format is {layout!r}, and only {', '.join((_INTEGERS, *_FLOATS))} are "
                    "read here; load it with transformers or vLLM."
                )
            weights = group["weights"]
            _check_group(group, weights, "int" if layout == _INTEGERS else "float")
            size = weights["group_size"]
            scheme: Grid
            if layout == _INTEGERS:
                scheme = IntegerGrid(weights["num_bits"], -1 if size is None else size, weights["symmetric"])
            else:
                scheme = GRIDS.get(_FLOATS[layout])()
            named = set(group["targets"])
            wider = [target for target in named if target == "Linear" or target.startswith("re:")]
            found |= {layer: scheme for layer in layers if layer in named or any(_matches(t, layer) for t in wider)}
        return found

    def engines(self, schemes: set[Grid]) -> list[str]:
        symmetric = all(scheme.symmetric for scheme in schemes)
        on_cpu = all(isinstance(scheme, IntegerGrid) and scheme.num_bits == 4 for scheme in schemes)
        vllm = "vLLM (CUDA and CPU)" if on_cpu else "vLLM (CUDA)"
        return ["transformers" if symmetric else "transformers (CompressedTensorsConfig(dequantize=True))", vllm]


def _matches(target: str, layer: str) -> bool:
    """Tell whether a target, the class Linear or `re:` and an expression, means a packed layer."""
    return target == "Linear" or re.match(target.removeprefix("re:"), layer) is not None


def _layout_name(scheme: Grid) -> str:
    return next((layout for layout, grid in _FLOATS.items() if grid == str(scheme)), _INTEGERS)


def _weights(scheme: Grid) -> dict[str, Any]:
    """Return the arguments of a group, with the strategies' names."""
    if isinstance(scheme, NamedGrid):
        scales = {last: dtype for last, (dtype, _) in scheme.layout((32, 32)).items()}
        by_tensor = {"strategy": "tensor_group"} if "weight_global_scale" in scales else {"strategy": "group"}
        dtypes = {"scale_dtype": str(scales[_SCALE]), "zp_dtype": str(scales[_SCALE])}
        sizes = {"num_bits": scheme.num_bits, "type": "float", "symmetric": True, "group_size": scheme.group_size}
        return sizes | by_tensor | dtypes | {"dynamic": False}
    per_channel = scheme.group_size == -1
    return {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else scheme.group_size,
        "dynamic": False,
    }


def _check_group(group: dict[str, Any], weights: dict[str, Any], kind: str) -> None:
    if group.get("input_activations") or group.get("output_activations"):
        raise UserError("its activations are quantised too, which is not computed here; load it with vLLM.")
    if weights.get("type", "int") != kind or weights.get("actorder") not in (None, False, "static", "weight"):
        raise UserError(
            f"its weights are {weights.get('type')} with actorder {weights.get('actorder')!r}; only integers in plain "
            "groups are read here, load it with vLLM."
        )
