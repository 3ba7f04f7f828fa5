"""Sensitivity: which layers lose most when quantised alone, and a plan of mixed widths from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from lfq_lightning.errors import UserError
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import check_group
from lfq_lightning.planning.spend import spend
from lfq_lightning.planning.swapped_model import SwappedModel
from lfq_lightning.quantizers import QUANTIZERS
from lfq_lightning.registry import Plugin
from lfq_lightning.token_set import TokenSet


@dataclass(frozen=True)
class LayerSensitivity:
    """KL to full precision (nats per token) with only this layer rounded to nearest, by its width in bits."""

    name: str
    num_weights: int
    kl: dict[int, float]


def measure_sensitivity(
    checkpoint: Checkpoint, tokens: TokenSet, schemes: list[IntegerGrid]
) -> Iterator[LayerSensitivity]:
    """Yield the sensitivity of every linear layer of the blocks, in the order of the model.

    The whole model is held in fp32, and the full-precision input of each block for all `tokens`.

    Args:
        schemes: the grids to try, one per width.
    """
    skeleton = ModelSkeleton(checkpoint)
    for scheme in schemes:
        for index in range(len(skeleton)):
            for name in skeleton.linear_shapes(index):
                check_group(scheme, name, skeleton, index, "sensitivity")
    model = SwappedModel(checkpoint, tokens, observed=tokens)
    nearest: Plugin[Any] = QUANTIZERS.parse("rtn")
    for name, weight in model.layers().items():
        losses = {scheme.num_bits: model.kl({name: model.quantised(name, scheme, nearest)}) for scheme in schemes}
        yield LayerSensitivity(name, weight.numel(), losses)


def check_average(average_bits: float, widths: list[int]) -> None:
    """Raise UserError if no choice among the widths can have this average."""
    low, high = min(widths), max(widths)
    if not low <= average_bits <= high:
        raise UserError(f"--average-bits {average_bits} lies outside the widths {low} … {high}; change it, or --bits.")


def propose_widths(layers: list[LayerSensitivity], average_bits: float) -> dict[str, int]:
    """Return a width for each layer, their average over weights at most `average_bits`, for a small sum of KLs.

    From the smallest widths on, the step up that saves the most KL for its added bits is taken while it fits.

    Raises UserError if the average lies outside the widths that were measured.
    """
    widths = sorted(layers[0].kl)
    check_average(average_bits, widths)
    budget = math.floor(average_bits * sum(layer.num_weights for layer in layers) + 1e-6)
    costs = [[width * layer.num_weights for width in widths] for layer in layers]
    chosen = spend(costs, [[layer.kl[width] for width in widths] for layer in layers], budget)
    assert chosen is not None, "the average is no less than the smallest width"
    return {layer.name: widths[number] for layer, number in zip(layers, chosen, strict=True)}


def plan_of(chosen: dict[str, int], group_size: int, symmetric: bool) -> str:
    """Return the YAML of a plan with these widths, by GPTQ."""
    grid = {"group_size": group_size, "symmetric": symmetric}
    by_width: dict[int, list[str]] = {}
    for name, bits in chosen.items():
        by_width.setdefault(bits, []).append(name)
    common = max(by_width, key=lambda bits: len(by_width[bits]))
    rules: list[dict[str, Any]] = [
        {"match": names, "quantizer": {"name": "gptq", "bits": bits, **grid}}
        for bits, names in sorted(by_width.items())
        if bits != common
    ]
    rules.append({"match": "all", "quantizer": {"name": "gptq", "bits": common, **grid}})
    return yaml.safe_dump({"plan": rules}, sort_keys=False)
