"""GPTQLayout: AutoGPTQ's tensors, the same for both versions but for one added to the zero points."""

import re
from abc import ABC
from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.formats import PackFormat, Shape
from lfq_lightning.formats.fused import fused_parts
from lfq_lightning.formats.half_scale import half_scale
from lfq_lightning.grids import Grid, IntegerGrid
from lfq_lightning.ops.bitstream import pack, unpack
from lfq_lightning.quantized_tensor import QuantizedTensor

_WIDTHS = (2, 3, 4, 8)


class GPTQLayout(PackFormat, ABC):
    """`qweight` along the inputs, transposed; `qzeros` along the outputs; fp16 `scales`; `g_idx` in plain groups.

    Attributes:
        version: `checkpoint_format` in the config.
        zero_offset: what is taken off a zero point before it is stored.
    """

    quant_method = "gptq"
    scale_name = "scales"
    version: ClassVar[str]
    zero_offset: ClassVar[int]

    def check(self, name: str, scheme: Grid, shape: tuple[int, int]) -> None:
        bits = scheme.num_bits
        if bits not in _WIDTHS:
            raise UserError(f"{name} has {bits} bits, but {self.version} holds 2, 3, 4 and 8; use compressed-tensors.")
        if self.zero_offset and not scheme.symmetric:
            raise UserError(
                f"{name} is asymmetric; gptq (version 1) cannot store a zero point of 0, and engines take it "
                "symmetric only; use gptq_v2 or compressed-tensors."
            )
        for what, size in zip(("outputs", "inputs"), shape, strict=True):
            if size * bits % 32:
                raise UserError(
                    f"{name} has {size} {what} of {bits} bits, which fill no whole 32-bit words, as {self.version} "
                    "needs them; use compressed-tensors."
                )

    def layout(self, scheme: Grid, shape: tuple[int, int]) -> dict[str, Shape]:
        (o, i), bits = shape, scheme.num_bits
        groups = i // scheme.group_of(i)
        return {
            "qweight": (i * bits // 32, o),
            "qzeros": (groups, o * bits // 32),
            "scales": (groups, o),
            "g_idx": (i,),
        }

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        bits, width = quantized.scheme.num_bits, quantized.codes.shape[1]
        zero_point = quantized.zero_point[:, :, 0].T
        assert int(zero_point.min()) >= self.zero_offset, "check refuses asymmetric schemes in version 1"
        return {
            f"{name}.qweight": pack(quantized.codes, bits).T.contiguous(),
            f"{name}.qzeros": pack((zero_point - self.zero_offset).contiguous(), bits),
            f"{name}.scales": half_scale(name, quantized.scale[:, :, 0].T).contiguous(),
            f"{name}.g_idx": (torch.arange(width) // quantized.scheme.group_of(width)).int(),
        }

    def unpack(self, name: str, tensors: dict[str, Tensor], scheme: Grid) -> QuantizedTensor:
        bits, order = scheme.num_bits, tensors[f"{name}.g_idx"]
        width, (_, rows) = len(order), tensors[f"{name}.scales"].shape
        if not torch.equal(order.long(), torch.arange(width) // scheme.group_of(width)):
            raise UserError(
                f"{name}: g_idx mixes the groups (act-order), which is not read here; use GPTQModel or vLLM."
            )
        codes = unpack(tensors[f"{name}.qweight"].T.contiguous(), bits, width)
        zero_point = unpack(tensors[f"{name}.qzeros"], bits, rows) + self.zero_offset
        scale = tensors[f"{name}.scales"].T[:, :, None].contiguous()
        return QuantizedTensor(codes, scale, zero_point.T[:, :, None].contiguous(), scheme)

    def config(self, schemes: dict[str, Grid], dense: list[str]) -> dict[str, Any]:
        """The commonest scheme stands for all; `dynamic` names what differs (`+:`) and what stays dense (`-:`)."""
        common = Counter(schemes.values()).most_common(1)[0][0]
        every: dict[str, Grid | None] = {**dict.fromkeys(dense), **schemes}
        every.pop("lm_head", None)
        for fused, parts in fused_parts(list(every)).items():  # under whose name vLLM looks for a rule
            if len({every[part] for part in parts}) == 1:
                every[fused] = every[parts[0]]
        dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name, scheme in every.items() if scheme is None}
        dynamic |= {f"+:^{re.escape(name)}$": _keys(s) for name, s in every.items() if s is not None and s != common}
        found = {
            "quant_method": self.quant_method,
            "checkpoint_format": self.version,
            **_keys(common),
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        return {**found, "dynamic": dynamic} if dynamic else found

    def schemes(self, config: dict[str, Any], layers: list[str]) -> dict[str, Grid]:
        rules = [
            (rule[2:], {**config, **keys}) for rule, keys in (config.get("dynamic") or {}).items() if rule[0] != "-"
        ]
        found: dict[str, Grid] = {}
        for layer in layers:
            keys = next((own for pattern, own in rules if re.match(pattern, layer)), config)
            found[layer] = IntegerGrid(keys["bits"], keys["group_size"], keys["sym"])
        return found

    def engines(self, schemes: set[Grid]) -> list[str]:
        vllm = all(scheme.symmetric and scheme.num_bits in (4, 8) for scheme in schemes)
        return ["GPTQModel", "transformers (with gptqmodel)", *(["vLLM"] if vllm and self.zero_offset else [])]


def _keys(scheme: Grid) -> dict[str, Any]:
    return {"bits": scheme.num_bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
