"""Sensitivity: which layers lose most when quantised alone, and a plan of mixed widths from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.objectives.kl import KL
from lfq_lightning.plan import check_group
from lfq_lightning.quantizers.rtn import RTN
from lfq_lightning.token_set import TokenSet


@dataclass(frozen=True)
class LayerSensitivity:
    """KL to full precision (nats per token) with only this layer rounded to nearest, by its width in bits."""

    name: str
    num_weights: int
    kl: dict[int, float]


@torch.no_grad()
def measure_sensitivity(
    checkpoint: Checkpoint, tokens: TokenSet, schemes: list[IntegerGrid]
) -> Iterator[LayerSensitivity]:
    """Yield the sensitivity of every linear layer of the blocks, in the order of the model.

    The whole model is held in fp32, and the full-precision input of each block for all `tokens`.

    Args:
        schemes: the grids to try, one per width.
    """
    skeleton = ModelSkeleton(checkpoint)
    checkpoint.check_finite()
    for scheme in schemes:
        for index in range(len(skeleton)):
            for name in skeleton.linear_shapes(index):
                check_group(scheme, name, skeleton, index, "sensitivity")
    inputs = [torch.cat([skeleton.embed(row[None]) for row in tokens.input_ids])]
    blocks = [skeleton.block(range(index, index + 1)) for index in range(len(skeleton))]
    for block in blocks:
        inputs.append(torch.cat([block(part) for part in inputs[-1].split(1)]))
    head, objective = skeleton.head(torch.float32), KL()
    target = objective.target(head.readout(inputs[-1][tokens.mask]), head)

    def kl_from(start: int) -> float:
        hidden: Tensor = inputs[start]
        for later in blocks[start:]:
            hidden = torch.cat([later(part) for part in hidden.split(1)])
        return float(objective.token_loss(head.readout(hidden[tokens.mask]), target, head).mean())

    for index, block in enumerate(blocks):
        for name, linear in block.linears().items():
            weight, kl = linear.weight.clone(), {}
            for scheme in schemes:
                rtn = RTN(weight, scheme, checkpoint.dtype)
                rtn.solve()
                linear.weight.copy_(rtn.export().dequantize())
                kl[scheme.num_bits] = kl_from(index)
            linear.weight.copy_(weight)
            yield LayerSensitivity(name, weight.numel(), kl)


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
    chosen = {layer.name: widths[0] for layer in layers}
    room = math.floor((average_bits - widths[0]) * sum(layer.num_weights for layer in layers) + 1e-6)
    while True:
        steps = []
        for layer in layers:
            now = chosen[layer.name]
            for wider in (width for width in widths if width > now):
                cost = (wider - now) * layer.num_weights
                if cost <= room and layer.kl[wider] < layer.kl[now]:
                    steps.append(((layer.kl[now] - layer.kl[wider]) / cost, layer.name, wider, cost))
        if not steps:
            return chosen
        _, name, wider, cost = max(steps)
        chosen[name] = wider
        room -= cost


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
