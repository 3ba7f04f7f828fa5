"""Round a weight to the nearest level of a grid."""

from torch import Tensor

from lfq_lightning.grids.grid import Grid


def round_to_nearest(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return codes (O, I), whole numbers in fp32, for weight (O, I) fp32, scale and zero (O, G, 1)."""
    grouped = weight.view(len(weight), scale.shape[1], -1)
    return grid.levels.round(grouped, scale.float(), zero.float()).view_as(weight)
