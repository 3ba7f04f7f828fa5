"""MLX: what Apple's machines run through mlx-lm."""

import logging
from collections import Counter
from functools import cache
from typing import Any

from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.formats import FORMATS, Dtypes, PackFormat, Shape
from lfq_lightning.formats.named import grid_dtypes, pack_named, unpack_named
from lfq_lightning.grids import Grid, IntegerGrid
from lfq_lightning.grids.affine import Affine
from lfq_lightning.quantized_tensor import QuantizedTensor

log = logging.getLogger(__name__)


@FORMATS.register
class MLX(PackFormat):
    """2 to 8 bits (not 7), groups of 32, 64 or 128, a scale and a minimum each; integers too.

    Symmetric integers are held exactly; of asymmetric ones, zero point times scale is rounded to the scale's dtype.
    """

    paper = "MLX, mx.quantize, mode affine; mlx-lm, `quantization` in config.json"
    outer = frozenset({"embeddings", "head"})
    quant_method = "mlx"
    scale_name = "scales"
    codes_name = "scales"  # what only packed layers have: the codes' own name is `weight`

    def check(self, name: str, scheme: Grid, shape: tuple[int, int]) -> None:
        try:
            _affine(scheme)
        except UserError as error:
            raise UserError(f"{name} has {scheme}; mlx holds 2, 3, 4, 5, 6, 8 bits, groups of 32, 64, 128.") from error
        if shape[1] % 32:
            raise UserError(f"{name} has {shape[1]} inputs, but mlx needs a multiple of 32.")

    def layout(self, scheme: Grid, shape: tuple[int, int]) -> dict[str, Shape]:
        return {last: stored for last, (_, stored) in _affine(scheme).layout(shape).items()}

    def dtypes(self, scheme: Grid, last: str) -> Dtypes:
        return grid_dtypes(_affine(scheme), last)

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        grid, scale, zero = _affine(quantized.scheme), quantized.scale, quantized.zero_point
        if isinstance(quantized.scheme, IntegerGrid):
            zero = (zero.float() * scale.float()).to(scale.dtype)
            if not quantized.scheme.symmetric:
                _warn(str(scale.dtype).removeprefix("torch."))
        return pack_named(name, QuantizedTensor(quantized.codes, scale, zero, grid), grid)

    def unpack(self, name: str, tensors: dict[str, Tensor], scheme: Grid) -> QuantizedTensor:
        return unpack_named(name, tensors, _affine(scheme))

    def config(self, schemes: dict[str, Grid], dense: list[str]) -> dict[str, Any]:
        """The commonest bits and groups stand for all; layers that differ are listed."""
        sizes = {name: (scheme.num_bits, scheme.group_size) for name, scheme in schemes.items()}
        common = Counter(sizes.values()).most_common(1)[0][0]
        keys = ("bits", "group_size")
        others = {name: dict(zip(keys, size, strict=True)) for name, size in sizes.items() if size != common}
        return {"quant_method": self.quant_method, **dict(zip(keys, common, strict=True)), "mode": "affine", **others}

    def settings(self, quantization: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in quantization.items() if key != "quant_method"}
        return {"quantization": own, "quantization_config": quantization}

    def schemes(self, config: dict[str, Any], layers: list[str]) -> dict[str, Grid]:
        if config.get("mode", "affine") != "affine":
            raise UserError(f"its mlx mode is {config['mode']!r}, and only affine is read here; use mlx-lm.")
        found = {layer: {**config, **(config.get(layer) or {})} for layer in layers}
        return {layer: Affine(bits=own["bits"], group_size=own["group_size"]) for layer, own in found.items()}

    def engines(self, schemes: set[Grid]) -> list[str]:
        return ["mlx-lm"]


def _affine(scheme: Grid) -> Affine:
    return scheme if isinstance(scheme, Affine) else Affine(bits=scheme.num_bits, group_size=scheme.group_size)


@cache
def _warn(dtype: str) -> None:
    log.warning("mlx: minima are zero point times scale, rounded to %s; grid affine trains such minima", dtype)
