"""Quantizers: one file each. `QUANTIZERS` knows them by name."""

from lfq_lightning.ops.learned_grid import round_through, ship_through
from lfq_lightning.quantizers.nearest_quantizer import NearestQuantizer
from lfq_lightning.quantizers.quantizer import ClosedFormQuantizer, DenseQuantizer, LearnedQuantizer, Quantizer
from lfq_lightning.registry import Registry

QUANTIZERS: Registry[Quantizer] = Registry("quantizer", Quantizer)  # type: ignore[type-abstract]

__all__ = [
    "QUANTIZERS",
    "ClosedFormQuantizer",
    "DenseQuantizer",
    "LearnedQuantizer",
    "NearestQuantizer",
    "Quantizer",
    "round_through",
    "ship_through",
]
