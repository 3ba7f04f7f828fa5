"""Fold a scaling of a layer's inputs into the layer before it: exact for the model, easier to quantise (AWQ)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lfq_lightning.calibration.find_folds import Fold, FoundFolds, divide
from lfq_lightning.calibration.observe import observe_halves
from lfq_lightning.calibration.solve import Inputs, Observed
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.families import Family, Folds
from lfq_lightning.quantizers import ClosedFormQuantizer
from lfq_lightning.registry import plugin_name
from lfq_lightning.stages import LayerPlan


def fold_scales(
    block: DecoderBlock,
    layers: dict[str, LayerPlan],
    inputs: Inputs,
    family: Family,
    dtype: torch.dtype,
    ranks: Ranks,
    found: FoundFolds,
) -> Observed:
    """Scale the inputs of layers whose quantizer wants it, in place; return what their quantizers have seen.

    With s from the quantizer's `input_scale`, the layer's weight becomes W·diag(s), and what makes its input (a norm,
    or a linear layer whose outputs reach it one by one) is divided by s, in `dtype` as it ships. A pair whose shapes
    disagree (v → o under grouped queries) is left alone. Of a family whose folds are not known they are found.
    """
    if not any(layer.closed_form.cls.scales_inputs for layer in layers.values()):
        return Observed()
    if family.folds is None:
        folds = ranks.once(lambda: found.of(block, next(inputs(0))[0][:1]))
    else:
        folds = _listed(block, family.folds, family.unit_offset)
    pairs = _pairs(block, layers, folds, dtype)
    linears, observed = block.linears(), Observed()
    watching = {linears[pair.readers[0]]: pair.quantizer for pair in pairs}
    if pairs:
        observe_halves(watching.values(), partial(_observe, block, watching, inputs), ranks)
    for pair in pairs:
        input_scale, width = ranks.same(pair.quantizer.input_scale()), linears[pair.readers[0]].in_features
        if input_scale.shape != (width,) or not bool((input_scale.isfinite() & (input_scale > 0)).all()):
            raise UserError(
                f"quantizer {plugin_name(type(pair.quantizer))}: input_scale returned {tuple(input_scale.shape)} for "
                f"{pair.readers[0]}, or values that are not positive; return {width} positive factors."
            )
        scale = divide(pair.source, input_scale, dtype, pair.unit_offset)
        for name in pair.readers:
            linears[name].weight.mul_(scale)
        if pair.quantizer.divide_inputs(scale):
            observed |= dict.fromkeys(pair.readers, pair.quantizer.statistics())
    return observed


@dataclass(frozen=True)
class _Pair:
    """A module, the linear layers that read what it makes, and the quantizer of those, stacked by rows."""

    source: nn.Module
    readers: tuple[str, ...]
    unit_offset: bool
    quantizer: ClosedFormQuantizer


def _listed(block: DecoderBlock, folds: Folds, unit_offset: bool) -> list[Fold]:
    """Return the folds that a row of families.py names, but for those whose shapes disagree."""
    linears = block.linears()
    named = [
        Fold(
            f"{prefix}.{source}",
            tuple(f"{prefix}.{name}" for name in readers),
            unit_offset and f"{prefix}.{source}" not in linears,
        )
        for prefix in block.names
        for source, readers in folds
    ]
    return [
        fold
        for fold in named
        if fold.source not in linears or linears[fold.source].out_features == linears[fold.readers[0]].in_features
    ]


def _pairs(block: DecoderBlock, layers: dict[str, LayerPlan], folds: list[Fold], dtype: torch.dtype) -> list[_Pair]:
    """Return the folds whose readers all want scaled inputs, for one grid."""
    pairs, modules, linears = [], block.modules_by_name(), block.linears()
    for fold in folds:
        wanting = [layers[name] for name in fold.readers if name in layers]
        wanting = [plan for plan in wanting if plan.closed_form.cls.scales_inputs]
        alike = {(plan.scheme, plan.closed_form.cls) for plan in wanting}
        if len(wanting) < len(fold.readers) or len(alike) > 1:
            continue
        closed_form, weight = wanting[0].closed_form, torch.cat([linears[name].weight for name in fold.readers])
        assert issubclass(closed_form.cls, ClosedFormQuantizer)
        grid = wanting[0].scheme.fitted(weight)
        quantizer: ClosedFormQuantizer = closed_form.build(weight.detach(), grid, dtype)
        pairs.append(_Pair(modules[fold.source], fold.readers, fold.unit_offset, quantizer))
    return pairs


def _observe(block: DecoderBlock, watching: dict[nn.Linear, ClosedFormQuantizer], inputs: Inputs, half: int) -> None:
    """Show each quantizer the inputs of its layer, in one pass: no pair's scaling changes another pair's inputs."""
    caught: dict[nn.Module, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda module, arguments: caught.update({module: arguments[0]}))
        for linear in watching
    ]
    try:
        for hidden, mask in inputs(half):
            block(hidden)
            for linear, quantizer in watching.items():
                quantizer.observe(caught.pop(linear).reshape(*mask.shape, -1)[mask])
    finally:
        for hook in hooks:
            hook.remove()
