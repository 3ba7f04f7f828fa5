"""Grids: one file each. `GRIDS` knows by name those that formats define; plain integers are said by their bits."""

from lfq_lightning.grids.grid import Grid, Pair
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.grids.named_grid import NamedGrid
from lfq_lightning.registry import Registry

GRIDS: Registry[NamedGrid] = Registry("grid", NamedGrid)  # type: ignore[type-abstract]

__all__ = ["GRIDS", "Grid", "IntegerGrid", "NamedGrid", "Pair"]
