"""Solve a block: run the closed-form quantizers of its layers, in the order the data flows."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lfq_lightning.decoder_block import DecoderBlock
from lfq_lightning.errors import UserError
from lfq_lightning.observe import observe_halves
from lfq_lightning.peak_memory import return_freed_memory
from lfq_lightning.plan import LayerPlan
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import ClosedFormQuantizer, DenseQuantizer
from lfq_lightning.ranks import Ranks
from lfq_lightning.registry import plugin_name

# Yields hidden states (B, T, D) and masks (B, T) of this rank's even (0) or odd (1) sequences, each time anew.
Inputs = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Solution:
    """A layer's closed-form codes, and, if it is to be trained, the weight (O, I) fp32 whose rounding they are."""

    quantized: QuantizedTensor
    latent: Tensor | None


class _ReachedError(Exception):
    """Raised by a hook to leave the block's forward where the wanted inputs are known."""


def solve(
    block: DecoderBlock,
    layers: dict[str, LayerPlan],
    inputs: Inputs,
    scale_dtype: torch.dtype,
    reference: Inputs,
    ranks: Ranks,
) -> dict[str, Solution]:
    """Quantise the linear layers of `block` in closed form, in place, and return each layer's solution.

    Layers with a DenseQuantizer get its weight and no solution.

    True-sequential (GPTQ, section 4): a layer's quantizer sees inputs made by the already quantised layers before it.
    Layers that read the same tensor and have the same plan (q, k, v; gate, up) share one pass and one solve. Each rank
    shows the quantizers its own sequences, and solves its share of the rows.

    Args:
        block: in full precision.
        layers: the plan of each layer that is quantised.
        inputs: the quantised prefix's hidden states before the block.
        scale_dtype: the dtype in which scales ship.
        reference: the full-precision model's hidden states before the block; read only by quantizers that ask for it.
        ranks: who else calibrates this block.
    """
    teacher = copy.deepcopy(block) if any(layer.needs_reference for layer in layers.values()) else block
    solutions: dict[str, Solution] = {}
    for stage in _stages(block, inputs):
        groups: dict[tuple[str, str], list[str]] = {}
        for name in stage:
            if name in layers:
                groups.setdefault(_key(layers[name]), []).append(name)
        seen = partial(_inputs_of, block, block.linears()[stage[0]], inputs)
        wanted = partial(_inputs_of, teacher, teacher.linears()[stage[0]], reference)
        solutions |= _solve_stage(block.linears(), list(groups.values()), layers, seen, wanted, scale_dtype, ranks)
        return_freed_memory()  # of a stage: several times its weights
    return solutions


def _solve_stage(
    linears: dict[str, nn.Linear],
    groups: list[list[str]],
    layers: dict[str, LayerPlan],
    seen: Callable[[int], Iterator[Tensor]],
    wanted: Callable[[int], Iterator[Tensor]],
    scale_dtype: torch.dtype,
    ranks: Ranks,
) -> dict[str, Solution]:
    """Quantise layers that read one tensor; those of a group have one plan and are stacked."""
    quantizers: list[tuple[list[str], ClosedFormQuantizer]] = []
    for names in groups:
        plan = layers[names[0]]
        if issubclass(plan.closed_form.cls, DenseQuantizer):
            for name in names:
                dense = plan.closed_form.build(linears[name].weight.detach(), plan.scheme).export()
                linears[name].weight.copy_(dense.to(scale_dtype))
            continue
        weight = torch.cat([linears[name].weight.detach() for name in names])
        weight = weight[ranks.rows(len(weight))]
        quantizers.append((names, plan.closed_form.build(weight, plan.scheme, scale_dtype)))
    watching = [quantizer for _, quantizer in quantizers if quantizer.needs_inputs]
    correcting = [quantizer for names, quantizer in quantizers if layers[names[0]].needs_reference]
    if watching:
        observe_halves(watching, partial(_show, watching, seen, correcting, wanted), ranks)
    solutions: dict[str, Solution] = {}
    for names, quantizer in quantizers:
        quantizer.solve()
        sizes = [linears[name].out_features for name in names]
        exported, latent = _whole(quantizer, names, sum(sizes), ranks)
        parts = zip(exported.split(sizes), latent.split(sizes), strict=True)
        for name, (quantized, part) in zip(names, parts, strict=True):
            solutions[name] = Solution(quantized, part if layers[name].learned else None)
            linears[name].weight.copy_(quantized.dequantize())
    return solutions


def _show(
    watching: list[ClosedFormQuantizer],
    seen: Callable[[int], Iterator[Tensor]],
    correcting: list[ClosedFormQuantizer],
    wanted: Callable[[int], Iterator[Tensor]],
    half: int,
) -> None:
    """Show quantizers the inputs of their layers, and those that correct also what the teacher has there."""
    reference = wanted(half) if correcting else None
    for rows in seen(half):
        for quantizer in watching:
            quantizer.observe(rows)
        if reference is not None:
            wanted_rows = next(reference)
            for quantizer in correcting:
                quantizer.observe_reference(rows, wanted_rows)


def _whole(quantizer: ClosedFormQuantizer, names: list[str], rows: int, ranks: Ranks) -> tuple[QuantizedTensor, Tensor]:
    """Return codes and latent of all rows, from the share of them that each rank has solved."""
    exported, shape = quantizer.export(), quantizer.weight.shape
    if exported.codes.shape != shape or quantizer.latent.shape != shape:
        raise UserError(
            f"quantizer {plugin_name(type(quantizer))}: codes and latent are {tuple(exported.codes.shape)} and "
            f"{tuple(quantizer.latent.shape)} for {' + '.join(names)}; both must be {tuple(shape)}, as the weight."
        )
    parts = (exported.codes, exported.scale, exported.zero_point, quantizer.latent)
    codes, scale, zero_point, latent = (ranks.gather_rows(part, rows) for part in parts)
    if not scale.isfinite().all():
        raise UserError(f"quantizer {plugin_name(type(quantizer))}: NaN or infinite scale in {names[0]}.")
    return QuantizedTensor(codes, scale, zero_point, exported.scheme), latent


def _key(plan: LayerPlan) -> tuple[str, str]:
    return repr(plan.scheme), repr(plan.closed_form)


def _stages(block: DecoderBlock, inputs: Inputs) -> list[list[str]]:
    """Return the linear layers grouped by the tensor they read, in the order of the forward."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            for tensor, names in seen:
                if tensor is arguments[0]:
                    names.append(name)
                    return
            seen.append((arguments[0], [name]))

        return hook

    hooks = [linear.register_forward_pre_hook(note(name)) for name, linear in block.linears().items()]
    hidden, _ = next(itertools.chain(inputs(0), inputs(1)))
    block(hidden[:1])
    for hook in hooks:
        hook.remove()
    return [names for _, names in seen]


def _inputs_of(block: DecoderBlock, linear: nn.Linear, inputs: Inputs, half: int) -> Iterator[Tensor]:
    """Yield the inputs (tokens, I) of one layer, pads removed, for each batch."""
    caught: list[Tensor] = []

    def leave(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])
        raise _ReachedError

    hook = linear.register_forward_pre_hook(leave)
    try:
        for hidden, mask in inputs(half):
            try:
                block(hidden)
            except _ReachedError:
                yield caught.pop()[mask]
    finally:
        hook.remove()
