"""Formats: one file each. `FORMATS` knows them by name."""

from lfq_lightning.formats.pack_format import Dtypes, PackFormat, Shape, check_layout
from lfq_lightning.registry import Registry

FORMATS: Registry[PackFormat] = Registry("format", PackFormat)  # type: ignore[type-abstract]

__all__ = ["FORMATS", "Dtypes", "PackFormat", "Shape", "check_layout"]
