"""ggml: llama.cpp's blocks in safetensors; what a run on its grids writes, and `lfq export --format gguf` takes."""

from typing import Any

from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.formats import FORMATS, Dtypes, PackFormat, Shape
from lfq_lightning.formats.named import grid_dtypes, pack_named, unpack_named
from lfq_lightning.grids import GRIDS, Grid, NamedGrid
from lfq_lightning.grids.ggml_grid import BLOCKS
from lfq_lightning.quantized_tensor import QuantizedTensor


@FORMATS.register
class Ggml(PackFormat):
    """The grids of llama.cpp, each layer the bytes that a GGUF file holds of it."""

    paper = "llama.cpp, ggml-common.h"
    outer = frozenset({"embeddings", "head"})
    quant_method = "ggml"
    scale_name = BLOCKS
    codes_name = BLOCKS

    def check(self, name: str, scheme: Grid, shape: tuple[int, int]) -> None:
        """Every grid of its own fits."""

    def layout(self, scheme: Grid, shape: tuple[int, int]) -> dict[str, Shape]:
        return {last: stored for last, (_, stored) in _named(scheme).layout(shape).items()}

    def dtypes(self, scheme: Grid, last: str) -> Dtypes:
        return grid_dtypes(_named(scheme), last)

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        return pack_named(name, quantized, _named(quantized.scheme))

    def unpack(self, name: str, tensors: dict[str, Tensor], scheme: Grid) -> QuantizedTensor:
        return unpack_named(name, tensors, _named(scheme))

    def config(self, schemes: dict[str, Grid], dense: list[str]) -> dict[str, Any]:
        kinds = sorted({str(scheme) for scheme in schemes.values()})
        types = {kind: [name for name, scheme in schemes.items() if str(scheme) == kind] for kind in kinds}
        return {"quant_method": self.quant_method, "types": types, "ignore": dense}

    def schemes(self, config: dict[str, Any], layers: list[str]) -> dict[str, Grid]:
        found: dict[str, Grid] = {}
        for kind, named in config["types"].items():
            grid = GRIDS.get(kind)()
            if grid.format != self.quant_method:
                raise UserError(f"its quantization_config has layers on {kind}, which is no grid of llama.cpp's.")
            found |= dict.fromkeys(named, grid)
        return {layer: found[layer] for layer in layers if layer in found}

    def engines(self, schemes: set[Grid]) -> list[str]:
        return ["llama.cpp (after `lfq export --format gguf`)"]


def _named(scheme: Grid) -> NamedGrid:
    assert isinstance(scheme, NamedGrid), "check has seen it"
    return scheme
