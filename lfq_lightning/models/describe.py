"""What was found of a model that is not packed: `lfq inspect` prints it."""

from collections import Counter

from rich.console import Console

from lfq_lightning.models.checkpoints.shape_checkpoint import ShapeCheckpoint
from lfq_lightning.models.coverage import coverage
from lfq_lightning.models.families import FAMILIES
from lfq_lightning.models.model_skeleton import ModelSkeleton


def describe_model(path: str) -> None:
    """Print where the parts of a model are, what can be packed and what is kept; reads no weights.

    Raises UserError for a model that cannot be taken apart.
    """
    checkpoint, console = ShapeCheckpoint(path), Console(markup=False, highlight=False, soft_wrap=True)
    skeleton = ModelSkeleton(checkpoint)
    family, kind = checkpoint.family, checkpoint.config.model_type
    found = coverage(skeleton)
    scale, cap = skeleton.logit_terms
    terms = f"c·tanh(z / c), c = {cap:g}" if cap is not None else f"{scale:g}·z" if scale != 1.0 else "z"
    folds = "found and checked in each block" if family.folds is None else "known of this family"
    beside = [name for name in skeleton.outside_linears() if name != family.head]
    lines = {
        "model": f"{path}: {skeleton.architecture.__name__}, type {kind}, not packed",
        "parts": "named in families.py" if kind in FAMILIES else "found",
        "blocks": f"{len(skeleton)} in {family.blocks}: {_counted(map(skeleton.kind, range(len(skeleton))))}",
        "head": f"{family.head} behind {family.norm}; logits are {terms} of its products z",
        "embeddings": family.embeddings + (", the head too" if checkpoint.tied else ""),
        "folds for AWQ": folds,
        "can be packed": f"{found.packable:,} of the blocks' parameters, {found.share:.1%}",
        "kept in the blocks": ", ".join(f"{name} ({size:,})" for name, size in found.kept.items()),
        "kept outside them": f"embeddings, head, norm, and {_parts(beside)}" if beside else "embeddings, head, norm",
    }
    for label, text in lines.items():
        console.print(f"{label + ':':<20}{text}")


def _counted(kinds: "map[str]") -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())


def _parts(names: list[str]) -> str:
    """Return the parts of the model that linear layers outside the blocks are in, with their number."""
    return ", ".join(f"{part} ({count})" for part, count in Counter(".".join(n.split(".")[:2]) for n in names).items())
