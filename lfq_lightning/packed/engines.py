"""Which engines load a packed model."""

from lfq_lightning.formats import PackFormat
from lfq_lightning.formats.fused import fused_parts
from lfq_lightning.grids import Grid
from lfq_lightning.models.experts import mixture_of


def engines(packed: PackFormat, schemes: dict[str, Grid], dense: list[str]) -> list[str]:
    """Return the engines besides ours; vLLM not where layers that it fuses differ."""
    found = packed.engines(set(schemes.values()))
    if fused_differently(schemes, dense):
        found = [engine for engine in found if not engine.startswith("vLLM")]
    return found


def fused_differently(schemes: dict[str, Grid], dense: list[str]) -> list[str]:
    """Return the first layers that vLLM fuses and that differ in scheme, or are partly dense; or none."""
    every: dict[str, Grid | None] = {**dict.fromkeys(dense), **schemes}
    experts: dict[str, str] = {}  # of each layer the first one's: all experts are one module there
    for name in every:
        mixture = mixture_of(name)
        if mixture is not None and every[experts.setdefault(mixture, name)] != every[name]:
            return [experts[mixture], name]
    return next((parts for parts in fused_parts(list(every)).values() if len({every[part] for part in parts}) > 1), [])
