"""Layers on named grids, which know their own tensors."""

from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.formats.pack_format import FLOATS, Dtypes, PackFormat
from lfq_lightning.grids import GRIDS, Grid, IntegerGrid, NamedGrid
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.registry import plugin_name


def home(scheme: Grid) -> str:
    """Return the name of the format that a run writes a grid in."""
    return scheme.format if isinstance(scheme, NamedGrid) else "compressed_tensors"


def require_grid(packed: PackFormat, name: str, scheme: Grid) -> None:
    """Raise UserError if a layer is on a grid of another format's; asked once for all formats, plugins' too."""
    here = plugin_name(type(packed))
    if isinstance(scheme, NamedGrid) and scheme.format != here:
        raise UserError(f"{name} is on the grid {scheme}, which {here} cannot hold; export to {scheme.format}.")
    if isinstance(scheme, IntegerGrid) and here == "ggml":
        raise UserError(f"{name} has {scheme}, which is no grid of llama.cpp's; export to compressed-tensors.")


def grid_dtypes(scheme: NamedGrid, last: str) -> Dtypes:
    """Return the dtypes that a stored tensor may have."""
    dtype = scheme.layout((256, 256))[last][0]
    return FLOATS if dtype is None else (dtype,)


def pack_named(name: str, quantized: QuantizedTensor, grid: NamedGrid) -> dict[str, Tensor]:
    """Return the stored tensors of a layer by full name."""
    parts = grid.pack(quantized.codes, quantized.scale, quantized.zero_point)
    return {f"{name}.{last}": tensor for last, tensor in parts.items()}


def unpack_named(name: str, tensors: dict[str, Tensor], grid: NamedGrid) -> QuantizedTensor:
    """Invert `pack_named`."""
    found, codes, scale, zero = grid.unpack({last: tensors[f"{name}.{last}"] for last in grid.layout((256, 256))})
    return QuantizedTensor(codes, scale, zero, found)


def format_of(schemes: dict[str, Grid]) -> str:
    """Return the name of the format that a run writes, given whose grids these are.

    Raises UserError if they are of several.
    """
    homes: dict[str, str] = {}
    for where, scheme in schemes.items():
        homes.setdefault(home(scheme), f"{where} ({scheme})")
    if len(homes) > 1:
        said = " and ".join(f"{where} is stored as {name}" for name, where in homes.items())
        raise UserError(f"{said}, and a model has one format; take grids of one. Of ggml: {_listed('ggml')}.")
    return next(iter(homes), "compressed_tensors")


def _listed(packed: str) -> str:
    return ", ".join(name for name in GRIDS.names() if GRIDS.get(name).format == packed)
