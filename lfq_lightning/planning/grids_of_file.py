"""`grid: FILE.gguf`: each layer on the grid that an existing file has for it."""

from dataclasses import replace
from typing import Any

from lfq_lightning.errors import UserError
from lfq_lightning.grids import GRIDS
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.packed.gguf_file import GgufFile
from lfq_lightning.plan import OUTER
from lfq_lightning.planning.matched_layers import matched_layers
from lfq_lightning.stages import Rule

_FULL = {"F32", "F16", "BF16"}


def names_a_file(rule: Rule) -> bool:
    """Tell whether a rule takes its grids from a GGUF file."""
    grid = rule.quantizer.get("grid") if isinstance(rule.quantizer, dict) else None
    return isinstance(grid, str) and grid.lower().endswith(".gguf")


def grids_of_files(rules: list[Rule], checkpoint: Checkpoint) -> list[Rule]:
    """Return the rules, those that name a file as one rule for each grid that it has for their layers.

    What the file has in full precision stays so. Raises UserError for a file of another model, or grids that are not
    trained here.
    """
    skeleton, found = ModelSkeleton(checkpoint), list[Rule]()
    for rule, shapes in zip(rules, matched_layers(rules, skeleton), strict=True):
        if not names_a_file(rule):
            found.append(rule)
            continue
        assert isinstance(rule.quantizer, dict)
        file = GgufFile(rule.quantizer["grid"], "grid")
        by_grid: dict[str, list[str]] = {}
        for name in shapes:
            kind = _type_of(file, name)
            if kind not in _FULL and kind.lower() not in GRIDS.names():
                raise UserError(f"grid: {rule.quantizer['grid']} has {name} as {kind}, which is not trained here.")
            by_grid.setdefault(kind, []).append(name)
        for kind, names in by_grid.items():
            options: dict[str, Any] | str = {**rule.quantizer, "grid": kind.lower()}
            if kind in _FULL:
                options = "fp"
            if rule.match not in OUTER:
                found.append(replace(rule, match=names, quantizer=options))
            elif kind not in _FULL:
                found.append(replace(rule, quantizer=options))
    return found


def _type_of(file: GgufFile, layer: str) -> str:
    stored = file.name_of(f"{layer}.weight")
    if stored is None:
        raise UserError(f"grid: {file.path} has no tensor for {layer}; it is of another model.")
    return str(file.tensors[stored].tensor_type.name)
