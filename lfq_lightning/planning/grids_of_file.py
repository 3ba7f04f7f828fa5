"""`grid: FILE.gguf`: each layer on the grid that an existing file has for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import user_path
from lfq_lightning.grids import GRIDS
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
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
        types = _types(user_path(rule.quantizer["grid"], "grid"), len(skeleton))
        by_grid: dict[str, list[str]] = {}
        for name in shapes:
            kind = types(name)
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


def _types(file: Path, blocks: int) -> Any:
    """Return a function from a layer's full name to the type that a file has it in."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading GGUF needs the gguf package: pip install 'lfq-lightning[gguf]'.") from error
    try:
        reader = gguf.GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"grid: {file} cannot be read as GGUF ({one_line(error)}); give another file.") from error
    stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    number = next((n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        raise UserError(f"grid: {file} is of architecture {architecture!r}, which the gguf package does not know.")
    names = gguf.get_tensor_name_map(number, blocks)

    def kind(layer: str) -> str:
        there = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if there not in stored:
            raise UserError(f"grid: {file} has no tensor for {layer}; it is of another model.")
        return stored[there]

    return kind
