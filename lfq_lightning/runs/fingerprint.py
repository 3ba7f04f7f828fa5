"""Fingerprints: what results depend on. A run resumes a folder, or takes blocks over, only if they agree."""

import hashlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, uint8

from lfq_lightning.data import CalibrationData
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.registry import Plugin, plugin_name
from lfq_lightning.runs.plugin_sources import sources, with_terms
from lfq_lightning.stages import BlockPlan, LayerPlan
from lfq_lightning.token_set import TokenSet

_VERSIONS = ("lfq-lightning", "torch", "transformers", "lightning")
_TRAINER = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "val_check_interval",
)
_SAMPLES, _SAMPLE_BYTES = 64, 2**16  # of each file of weights


def shared_facts(trainer: Trainer, seed: int, tokens: tuple[TokenSet, TokenSet]) -> dict[str, Any]:
    """Return what all blocks of a run depend on besides its model; JSON values, readable but for the data's digest."""
    settings = {f"trainer.{name}": getattr(trainer, name) for name in _TRAINER}
    versions = {f"version of {name}": version(name) for name in _VERSIONS}
    data = [value for each in tokens for value in (each.input_ids, each.mask)]
    return {"seed": seed, "data": digest(data), "device": trainer.strategy.root_device.type, **settings, **versions}


def own_facts(plans: list[BlockPlan], data: CalibrationData, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what else a run depends on: its model's files, how its data is made, every block's plan and plugins.

    Of each file of weights a sample is digested; each block's own tensors are in its fingerprint.
    """
    facts: dict[str, Any] = {f"data.{name}": value for name, value in data.settings().items()}
    if data.generated:  # its tokens are kept, and would hide that a file beside them has changed
        facts |= {f"data file {file}": sample_digest(file) for file in data.files()}
    facts |= {f"model file {file.name}": sample_digest(file) for file in checkpoint.weight_files()}
    for plan in plans:
        where = f"of block {plan.index}"
        facts |= {f"{name} {where}": getattr(plan, name) for name in ("steps", "lr", "batch_size", "optimizer")}
        facts[f"decoder layers {where}"] = list(plan.indices)
        facts[f"objective {where}"] = repr(plan.objective)
        what = f"{plan.stage.title}'s quantizer" if plan.stage.title else "quantizer"
        facts |= {f"{what} of {name}": repr(layer) for name, layer in plan.layers.items()}
        facts |= {f"source of {plugin.name}": digest([], sources(plugin)) for plugin in _plugins(plan)}
    return facts


def outer_fingerprint(layers: dict[str, LayerPlan]) -> str:
    """Return what precedes the first block's fingerprint: the plan of embeddings and head, if they have one."""
    code = {sources(layer.closed_form) for layer in layers.values()}
    return digest([], repr(layers), *sorted(code)) if layers else ""


def block_fingerprint(before: str, plan: BlockPlan, tensors: dict[str, Tensor]) -> str:
    """Return the fingerprint of a block: its plan, its full-precision tensors, the fingerprint of the block before."""
    code = {sources(plugin) for plugin in _plugins(plan)}
    what = repr(replace(plan, activation_checkpointing=False))  # which changes memory, and no result
    return digest([tensors[name] for name in sorted(tensors)], before, what, *sorted(code))


def _plugins(plan: BlockPlan) -> list[Plugin[Any]]:
    layers = [p for layer in plan.layers.values() for p in (layer.closed_form, layer.learned) if p is not None]
    stage: Plugin[Any] = Plugin(plugin_name(type(plan.stage)), type(plan.stage), {})
    return [term for plugin in (*layers, plan.objective, stage) for term in with_terms(plugin)]


def sample_digest(file: Path) -> str:
    """Return a digest of a file's size and of windows of it: it tells models apart without reading them whole."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(number * max(0, size - _SAMPLE_BYTES) // max(1, _SAMPLES - 1))
            found.update(stream.read(_SAMPLE_BYTES))
    return found.hexdigest()


def digest(tensors: list[Tensor], *texts: str) -> str:
    """Return a digest of all bits of tensors, in order, and of texts."""
    found = hashlib.sha256(repr(texts).encode())
    for tensor in tensors:
        found.update(repr(tensor.shape).encode())
        found.update(tensor.cpu().contiguous().view(-1).view(uint8).numpy().data)
    return found.hexdigest()
