"""Fingerprints: what a block's result depends on, so that one run takes over another's blocks only if they agree."""

import hashlib
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, uint8

from lfq_lightning.plan import BlockPlan
from lfq_lightning.registry import Plugin
from lfq_lightning.token_set import TokenSet

_VERSIONS = ("lfq-lightning", "torch", "transformers")
_TRAINER = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "val_check_interval",
)


def run_facts(trainer: Trainer, seed: int, tokens: tuple[TokenSet, TokenSet]) -> dict[str, Any]:
    """Return what all blocks of a run share besides its model; JSON values, readable but for the data's digest."""
    settings = {f"trainer.{name}": getattr(trainer, name) for name in _TRAINER}
    versions = {f"version of {name}": version(name) for name in _VERSIONS}
    data = [value for each in tokens for value in (each.input_ids, each.mask)]
    return {"seed": seed, "data": _digest(data), "device": trainer.strategy.root_device.type, **settings, **versions}


def block_fingerprint(before: str, plan: BlockPlan, tensors: dict[str, Tensor]) -> str:
    """Return the fingerprint of a block: its plan, its full-precision tensors, the fingerprint of the block before."""
    plugins = [p for layer in plan.layers.values() for p in (layer.closed_form, layer.learned) if p is not None]
    sources = {_source(plugin) for plugin in [*plugins, plan.objective]}
    return _digest([tensors[name] for name in sorted(tensors)], before, repr(plan), *sorted(sources))


def _source(plugin: Plugin[Any]) -> str:
    return Path(inspect.getfile(plugin.cls)).read_text(encoding="utf-8")


def _digest(tensors: list[Tensor], *texts: str) -> str:
    found = hashlib.sha256(repr(texts).encode())
    for tensor in tensors:
        found.update(repr(tensor.shape).encode())
        found.update(tensor.cpu().contiguous().view(-1).view(uint8).numpy().data)
    return found.hexdigest()
