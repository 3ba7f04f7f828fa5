"""What a quantization_config says of grids, in words."""

from typing import Any


def said_grids(quantization: dict[str, Any]) -> list[str]:
    """Return each kind of grid in the config of a run, in any of the formats that a run writes."""
    method = quantization.get("quant_method")
    if method == "ggml":
        return [f"{kind} in {len(layers)} layers" for kind, layers in quantization["types"].items()]
    if method == "mlx":
        every = [quantization, *(value for value in quantization.values() if isinstance(value, dict))]
        return [f"affine, {own['bits']} bits in groups of {own['group_size']}" for own in every]
    return [_said(group["weights"]) for group in quantization.get("config_groups", {}).values()]


def _said(weights: dict[str, Any]) -> str:
    size = weights.get("group_size")
    if weights["type"] == "float":
        return f"{'nvfp4' if size == 16 else 'mxfp4'}, 4 bits in groups of {size}"
    groups = "per channel" if not size or size == -1 else f"in groups of {size}"
    return f"{weights['num_bits']} bits {groups}, {'symmetric' if weights['symmetric'] else 'asymmetric'}"
