"""Weights stored in 8 or 4 bits floating point: which tensors on disk belong together, and what they stand for."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lfq_lightning.errors import UserError

_SCALES = ("_scale_inv", "_scale")  # behind the weight's name: FP8 of DeepSeek, and of compressed-tensors
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"  # MXFP4 of gpt-oss
_PER_BLOCK = 32  # values under one scale in MXFP4 (OCP Microscaling Formats 1.0, section 5.2), two in a byte
_OF_INPUTS = ("input_scale", "activation_scale", "input_global_scale", "k_scale", "v_scale")  # of no weight
_METHODS = {"fp8", "mxfp4", "compressed-tensors", "modelopt"}


def in_low_precision(quantization: dict[str, object]) -> bool:
    """Tell whether a `quantization_config` speaks of weights that are read here."""
    form = quantization.get("format")
    return quantization.get("quant_method") in _METHODS and form in (None, "float-quantized", "naive-quantized")


def check_method(quantization: dict[str, object], path: object) -> None:
    """Raise UserError for a method whose weights are not read here."""
    if not in_low_precision(quantization):
        method, form = quantization.get("quant_method"), quantization.get("format")
        raise UserError(
            f"{path} is quantised by {method}{f' ({form})' if form else ''}, which is not read here; give the "
            "full-precision model."
        )


def weights_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Return weight → the tensors on disk that make it, from the shapes of all; scales of inputs are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for name in shapes:
        weight, scale = name.removesuffix(_BLOCKS), next((name + s for s in _SCALES if name + s in shapes), None)
        if name.endswith(_BLOCKS) and weight + _BLOCK_SCALES in shapes:
            found[weight] = (name, weight + _BLOCK_SCALES)
        elif scale is not None:
            found[name] = (name, scale)
        elif not name.endswith((*_SCALES, _BLOCK_SCALES, *_OF_INPUTS)):
            found[name] = (name,)
    return found


def shape_of(parts: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the weight that these tensors make."""
    shape = shapes[parts[0]]
    if parts[-1].endswith(_BLOCK_SCALES):  # (experts, O, blocks, bytes) → (experts, I, O), as the model holds it
        return (*shape[:-3], shape[-2] * _PER_BLOCK, shape[-3])
    return shape


def dequantised(parts: tuple[str, ...], tensors: dict[str, Tensor], block: Sequence[int] | None) -> Tensor:
    """Return the weight that these tensors make: one in full precision as it is, else bf16.

    Args:
        block: rows and columns under one scale, where a scale is neither a weight's, nor a row's or a column's alone.

    Raises UserError for scales whose shape fits none of these.
    """
    weight = tensors[parts[0]]
    if len(parts) == 1:
        return weight.to(torch.bfloat16) if weight.dtype.itemsize == 1 and weight.is_floating_point() else weight
    scale = tensors[parts[1]]
    if parts[1].endswith(_BLOCK_SCALES):
        return convert_moe_packed_tensors(weight, scale)
    scale = scale.float()
    if scale.numel() > 1:
        for dim, size in enumerate(weight.shape):
            if scale.ndim != weight.ndim or scale.shape[dim] not in (1, size, -(-size // (block or [size] * 2)[dim])):
                raise UserError(
                    f"{parts[1]} is {tuple(scale.shape)}, which does not fit {tuple(weight.shape)} weights."
                )
            if scale.shape[dim] not in (1, size) and block is not None:
                scale = scale.repeat_interleave(block[dim], dim).narrow(dim, 0, size)
    return (weight.float() * scale).to(torch.bfloat16)
