"""Solve a block: run the closed-form quantizers of its layers, in the order the data flows."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lfq_lightning.calibration.observe import observe_halves
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.experts import in_expert, seeing, without_number
from lfq_lightning.peak_memory import return_freed_memory
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import ClosedFormQuantizer, DenseQuantizer
from lfq_lightning.quantizers.rtn import RTN
from lfq_lightning.registry import plugin_name
from lfq_lightning.stages import LayerPlan

log = logging.getLogger(__name__)

# Yields hidden states (B, T, D) and masks (B, T) of this rank's even (0) or odd (1) sequences, each time anew.
Inputs = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
# Statistics of the quantizers that have seen a layer's inputs already, over all ranks.
Observed = dict[str, list[Tensor]]


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
    observed: Observed,
) -> dict[str, Solution]:
    """Quantise the linear layers of `block` in closed form, in place, and return each layer's solution.

    Layers with a DenseQuantizer get its weight and no solution.

    True-sequential (GPTQ, section 4): a layer's quantizer sees inputs made by the already quantised layers before it,
    unless `observed` has its inputs.
    Layers that read the same tensor and have the same plan (q, k, v; gate, up) share one solve, and what reads the
    same tensor one pass; so do all experts' gate and up, and all experts' down. An expert that no token chose is
    rounded to nearest. Each rank shows the quantizers its own sequences, and solves its share of the rows.

    Args:
        block: in full precision.
        layers: the plan of each layer that is quantised.
        inputs: the quantised prefix's hidden states before the block.
        scale_dtype: the dtype in which scales ship.
        reference: the full-precision model's hidden states before the block; read only by quantizers that ask for it.
        ranks: who else calibrates this block.
        observed: what is known of some layers' inputs already (fold_scales); taken from, so that it is freed.
    """
    teacher = copy.deepcopy(block) if any(layer.needs_reference for layer in layers.values()) else block
    solutions: dict[str, Solution] = {}
    for stage in _stages(block, inputs):
        groups: list[list[list[str]]] = []  # by the tensor they read, then by their plan
        for names in stage:
            by_plan: dict[tuple[str, str], list[str]] = {}
            for name in names:
                if name in layers:
                    by_plan.setdefault(_key(layers[name]), []).append(name)
            groups.append(list(by_plan.values()))
        firsts = [names[0] for names in stage]
        seen = partial(inputs_of, block, firsts, inputs)
        wanted = partial(inputs_of, teacher, firsts, reference)
        solutions |= _solve_stage(block.linears(), groups, layers, seen, wanted, scale_dtype, ranks, observed)
        return_freed_memory()  # of a stage: several times its weights
    return solutions


@dataclass
class _Stacked:
    """Layers of one plan that read tensor number `reads` of a stage, and the quantizer of their rows."""

    names: list[str]
    reads: int
    quantizer: ClosedFormQuantizer
    corrects: bool
    tokens: int = 0

    def observe(self, rows: Tensor, wanted: Tensor | None) -> None:
        self.tokens += len(rows)
        if len(rows):
            self.quantizer.observe(rows)
            if self.corrects and wanted is not None:
                self.quantizer.observe_reference(rows, wanted)


def _solve_stage(
    linears: dict[str, nn.Linear],
    groups: list[list[list[str]]],
    layers: dict[str, LayerPlan],
    seen: Callable[[int], Iterator[list[Tensor]]],
    wanted: Callable[[int], Iterator[list[Tensor]]],
    scale_dtype: torch.dtype,
    ranks: Ranks,
    observed: Observed,
) -> dict[str, Solution]:
    """Quantise layers that read one tensor, or each expert's own; those of a group have one plan and are stacked."""
    stacks: list[_Stacked] = []
    watching: list[_Stacked] = []  # those that have to be shown their inputs
    for reads, names in ((reads, names) for reads, of_one in enumerate(groups) for names in of_one):
        plan = layers[names[0]]
        if issubclass(plan.closed_form.cls, DenseQuantizer):
            for name in names:
                weight = linears[name].weight
                dense = plan.closed_form.build(weight.detach(), plan.scheme).export()
                if dense.shape != weight.shape or not dense.isfinite().all():
                    raise UserError(
                        f"quantizer {plan.closed_form.name}: export returned {tuple(dense.shape)} for {name}, or NaN "
                        f"or infinity; return a finite weight {tuple(weight.shape)}."
                    )
                weight.copy_(dense.to(scale_dtype))
            continue
        weight = torch.cat([linears[name].weight.detach() for name in names])
        grid = plan.scheme.fitted(weight)
        weight = weight[ranks.rows(len(weight))]
        quantizer = plan.closed_form.build(weight, grid, scale_dtype)
        known = observed.get(names[0])
        for name in names:
            observed.pop(name, None)
        if known is not None:
            for mine, theirs in zip(quantizer.statistics(), known, strict=True):
                mine.copy_(theirs)
        stacks.append(_Stacked(names, reads, quantizer, plan.needs_reference))
        if quantizer.needs_inputs and known is None:
            watching.append(stacks[-1])
    if watching:
        observe_halves([stack.quantizer for stack in watching], partial(_show, watching, seen, wanted), ranks)
        counts = [int(count) for count in ranks.total(*(stack.tokens for stack in watching))]
        _report_experts(watching, counts)
        for stack, count in zip(watching, counts, strict=True):
            if count == 0:
                stack.quantizer = RTN(stack.quantizer.weight, stack.quantizer.scheme, scale_dtype)
    solutions: dict[str, Solution] = {}
    for stack in stacks:
        names, quantizer = stack.names, stack.quantizer
        quantizer.solve()
        sizes = [linears[name].out_features for name in names]
        exported, latent = _whole(quantizer, names, sum(sizes), ranks)
        parts = zip(exported.split(sizes), latent.split(sizes), strict=True)
        for name, (quantized, part) in zip(names, parts, strict=True):
            solutions[name] = Solution(quantized, part if layers[name].learned else None)
            linears[name].weight.copy_(quantized.dequantize())
    return solutions


def _report_experts(stacks: list[_Stacked], counts: list[int]) -> None:
    """Say how the tokens were shared among experts, and which had too few for what closed-form quantizers estimate."""
    experts = [(stack, count) for stack, count in zip(stacks, counts, strict=True) if in_expert(stack.names[0])]
    if not experts:
        return
    seen = sorted(count for _, count in experts)
    few = sum(count < stack.quantizer.weight.shape[1] for stack, count in experts)
    log.log(
        logging.WARNING if few else logging.INFO,
        "%s and %d more experts: %d … %d tokens, median %d; %d saw fewer than they have inputs%s",
        experts[0][0].names[0],
        len(experts) - 1,
        seen[0],
        seen[-1],
        seen[len(seen) // 2],
        few,
        f", of which {seen.count(0)} none: rounded to nearest" if 0 in seen else "",
    )


def _show(
    stacks: list[_Stacked],
    seen: Callable[[int], Iterator[list[Tensor]]],
    wanted: Callable[[int], Iterator[list[Tensor]]],
    half: int,
) -> None:
    """Show quantizers the inputs of their layers, and those that correct also what the teacher has there."""
    reference = wanted(half) if any(stack.corrects for stack in stacks) else None
    for tensors in seen(half):
        beside = next(reference) if reference is not None else None
        for stack in stacks:
            stack.observe(tensors[stack.reads], None if beside is None else beside[stack.reads])


def _whole(quantizer: ClosedFormQuantizer, names: list[str], rows: int, ranks: Ranks) -> tuple[QuantizedTensor, Tensor]:
    """Return codes and latent of all rows, from the share of them that each rank has solved."""
    shape = quantizer.weight.shape
    try:
        exported = quantizer.export()
    except UserError:
        raise
    except ValueError as error:  # no QuantizedTensor
        of = f"quantizer {plugin_name(type(quantizer))}"
        raise UserError(f"{of}: {error}, for {' + '.join(names)}; mend solve or export.") from error
    if exported.codes.shape != shape or quantizer.latent.shape != shape:
        raise UserError(
            f"quantizer {plugin_name(type(quantizer))}: codes and latent are {tuple(exported.codes.shape)} and "
            f"{tuple(quantizer.latent.shape)} for {' + '.join(names)}; both must be {tuple(shape)}, as the weight."
        )
    parts = (exported.codes, exported.scale, exported.zero_point, quantizer.latent)
    codes, scale, zero_point, latent = (ranks.gather_rows(part, rows) for part in parts)
    if not scale.isfinite().all():
        raise UserError(
            f"quantizer {plugin_name(type(quantizer))}: NaN or infinite scale in {names[0]}; mend its solve."
        )
    return QuantizedTensor(codes, scale, zero_point, exported.scheme), latent


def _key(plan: LayerPlan) -> tuple[str, str]:
    return repr(plan.scheme), repr(plan.closed_form)


def _stages(block: DecoderBlock, inputs: Inputs) -> list[list[list[str]]]:
    """Return the linear layers by the tensor they read, in the order of the forward; a layer's experts at once."""
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
    with seeing(block, None):
        block(hidden[:1])
    for hook in hooks:
        hook.remove()
    stages: dict[str, list[list[str]]] = {}
    for _, names in seen:
        stages.setdefault(without_number(names[0]), []).append(names)
    return list(stages.values())


def inputs_of(block: DecoderBlock, names: list[str], inputs: Inputs, half: int) -> Iterator[list[Tensor]]:
    """Yield the inputs (tokens, I) of some layers, pads removed, for each batch; the forward ends with the last."""
    linears, caught = block.linears(), dict[str, Tensor]()

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0]
            caught[name] = rows.squeeze(1) if rows.dim() == 4 else rows  # latent attention's have a head of their own
            if len(caught) == len(names):
                raise _ReachedError

        return hook

    hooks = [linears[name].register_forward_pre_hook(catch(name)) for name in names]
    try:
        for hidden, mask in inputs(half):
            with suppress(_ReachedError), seeing(block, mask):
                block(hidden)
            found = (caught.pop(name) for name in names)
            yield [rows[mask] if rows.dim() == mask.dim() + 1 else rows for rows in found]
    finally:
        for hook in hooks:
            hook.remove()
