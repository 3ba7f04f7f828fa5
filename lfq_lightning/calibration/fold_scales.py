"""Fold a scaling of a layer's inputs into the layer before it: exact for the model, easier to quantise (AWQ)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lfq_lightning.calibration.observe import observe_halves
from lfq_lightning.calibration.solve import Inputs, Observed
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.families import Family
from lfq_lightning.quantizers import ClosedFormQuantizer
from lfq_lightning.registry import plugin_name
from lfq_lightning.stages import LayerPlan


def fold_scales(
    block: DecoderBlock, layers: dict[str, LayerPlan], inputs: Inputs, family: Family, dtype: torch.dtype, ranks: Ranks
) -> Observed:
    """Scale the inputs of layers whose quantizer wants it, in place; return what their quantizers have seen.

    With s from the quantizer's `input_scale`, the layer's weight becomes W·diag(s), and what makes its input (a norm,
    or a linear layer whose outputs reach it one by one) is divided by s, in `dtype` as it ships. A pair whose shapes
    disagree (v → o under grouped queries) is left alone.
    """
    pairs = _pairs(block, layers, family, dtype)
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
        scale = _divide(pair.source, input_scale, dtype, family.unit_offset)
        for name in pair.readers:
            linears[name].weight.mul_(scale)
        if pair.quantizer.divide_inputs(scale):
            observed |= dict.fromkeys(pair.readers, pair.quantizer.statistics())
    return observed


@dataclass(frozen=True)
class _Pair:
    """A module, the linear layers that read what it makes, and the quantizer of those, stacked by rows."""

    source: nn.Module
    readers: list[str]
    quantizer: ClosedFormQuantizer


def _pairs(block: DecoderBlock, layers: dict[str, LayerPlan], family: Family, dtype: torch.dtype) -> list[_Pair]:
    found, modules, linears = [], block.modules_by_name(), block.linears()
    for prefix in block.names:
        for source_name, reader_names in family.folds:
            readers = [f"{prefix}.{name}" for name in reader_names]
            wanting = [name for name in readers if name in layers and layers[name].closed_form.cls.scales_inputs]
            if not wanting:
                continue
            plan = layers[wanting[0]]
            assert wanting == readers, "the plan checks that"
            assert issubclass(plan.closed_form.cls, ClosedFormQuantizer)
            source, weights = modules[f"{prefix}.{source_name}"], [linears[name].weight for name in readers]
            if isinstance(source, nn.Linear) and source.out_features != weights[0].shape[1]:
                continue
            quantizer: ClosedFormQuantizer = plan.closed_form.build(torch.cat(weights).detach(), plan.scheme, dtype)
            found.append(_Pair(source, readers, quantizer))
    return found


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
                quantizer.observe(caught.pop(linear)[mask])
    finally:
        for hook in hooks:
            hook.remove()


def _divide(source: nn.Module, scale: Tensor, dtype: torch.dtype, unit_offset: bool) -> Tensor:
    """Divide the outputs of a norm or linear layer by `scale` (I,), in place; return what they were divided by."""
    weight, bias = source.get_parameter("weight"), dict(source.named_parameters()).get("bias")
    if isinstance(source, nn.Linear):
        weight.copy_((weight / scale[:, None]).to(dtype))
    else:
        offset = 1.0 if unit_offset else 0.0
        before = weight + offset
        folded = (before / scale - offset).to(dtype)
        after = folded.float() + offset  # rounded: the readers make up for it
        left = (before == 0) | (after == 0)  # nothing there, or too little to be told from nothing: as it was
        weight.copy_(torch.where(left, weight, folded.float()))
        scale = torch.where(left, torch.ones_like(scale), before / after)
    if bias is not None:
        bias.copy_((bias / scale).to(dtype))
    return scale
