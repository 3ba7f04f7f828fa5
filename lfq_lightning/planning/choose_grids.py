"""A size, not a plan: which of several grids each layer gets, by what its own error does to the model."""

import copy
import logging
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from rich.console import Console
from rich.progress import track

from lfq_lightning.errors import UserError
from lfq_lightning.formats.fused import fused_parts
from lfq_lightning.grids import GRIDS, Grid, NamedGrid
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import OUTER, parse_grid, parse_quantizer
from lfq_lightning.planning.matched_layers import matched_layers
from lfq_lightning.planning.spend import spend
from lfq_lightning.planning.swapped_model import SwappedModel
from lfq_lightning.quantizers import QUANTIZERS
from lfq_lightning.registry import Plugin
from lfq_lightning.stages import STAGES, LayerPlan, Rule
from lfq_lightning.token_set import TokenSet

log = logging.getLogger(__name__)

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_LISTS = ("bits", "grid")
_INTEGERS = (2, 3, 4, 5, 6, 8)
_MARGIN = 0.97  # of one grid's KL that a choice must stay below: less is noise
_TRAINED = 0.3  # of GPTQ's KL is what trained rounding leaves (docs/log.md)

Setting = tuple[str, Any]


@dataclass(frozen=True)
class Choice:
    """Layers that get one grid, since engines compute them as one or since there is one; and the grids to choose from.

    Args:
        rule: which rule of the plan they come from.
        layer: what they get, on one of the grids.
        names: full names.
        settings: key and value of the quantizer in YAML for each grid, from the smallest on.
        grids: likewise.
        weights: how many there are.
        costs: bytes on each grid.
    """

    rule: int
    layer: LayerPlan
    names: tuple[str, ...]
    settings: tuple[Setting, ...]
    grids: tuple[Grid, ...]
    weights: int
    costs: tuple[int, ...]

    @property
    def closed_form(self) -> Plugin[Any]:
        """What tells the error of a grid: their own quantizer, or GPTQ for one that is trained, folds or corrects."""
        own = self.layer.closed_form
        other = self.layer.learned is not None or own.cls.scales_inputs or self.layer.needs_reference
        return QUANTIZERS.parse("gptq") if other else own


def parse_size(text: str) -> int:
    """Return the bytes of `60MB`, `1.5GB`, `900KB`. Raises UserError."""
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        size = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        raise UserError(f"size: {text!r} is no size; write it like 60MB, 1.5GB or 900KB.") from None
    if not 0 < size < float("inf"):
        raise UserError(f"size: {text!r} must be above 0.")
    return int(size)


def choose_grids(
    rules: list[Rule],
    checkpoint: Checkpoint,
    observed: TokenSet,
    tokens: tuple[TokenSet, TokenSet],
    size: int | None,
    average_bits: float | None,
) -> list[Rule]:
    """Return the rules with one grid for each layer, so that the model takes at most this much and loses little.

    `bits` or `grid` of a quantizer may be a list to choose from; if none is, all widths of its kind are. Each layer's
    grids are weighed by the KL to full precision with that layer alone on them, as its rule's closed-form quantizer
    leaves it, or GPTQ if that is only where training begins. The choice is kept if, on other tokens and all layers
    together, it loses less than one grid for each rule within the same size; else that is taken.

    Args:
        observed: what closed-form quantizers see.
        tokens: to measure layers on, and to compare the two on.
        size: bytes of all weights, what stays in full precision included; or None.
        average_bits: bits per weight of the layers that rules quantise, scales included; or None.

    Raises UserError if nothing is to be chosen, or nothing is small enough.
    """
    if (size is None) == (average_bits is None):
        raise UserError("size and average_bits: give one of them, not both.")
    skeleton = ModelSkeleton(checkpoint)
    choices = _choices(rules, skeleton)
    weights = sum(choice.weights for choice in choices)
    if average_bits is not None:
        budget = int(average_bits * weights / 8)
    else:
        assert size is not None
        budget = size - (_full_bytes(checkpoint) - checkpoint.dtype.itemsize * weights)
    least = sum(min(choice.costs) for choice in choices)
    if budget < least:
        room = f"{(size or 0) + least - budget:,} bytes" if size else f"{8 * least / weights:.3f} bits per weight"
        raise UserError(f"size: the smallest this plan can be is {room}; give more, or smaller bits or grid.")
    model, console = SwappedModel(checkpoint, tokens[0], observed), Console(highlight=False, markup=False)
    tracked = track(choices, "measuring layers", console=console, transient=True)
    losses = [_losses(model, choice) for choice in tracked]
    chosen = spend([choice.costs for choice in choices], losses, budget)
    assert chosen is not None, "the smallest fit"
    alike = _uniform(choices, losses, budget)
    if alike is not None and alike != chosen:
        model.measure_on(tokens[1])
        mixed = _joint(model, choices, chosen)
        uniform = _joint(model, choices, alike)
        log.info("before training: KL %.4f with chosen grids, %.4f with one for each rule", mixed, uniform)
        if mixed > _MARGIN * uniform:
            chosen = alike
    used = sum(choice.costs[number] for choice, number in zip(choices, chosen, strict=True))
    log.info("chosen: %.3f bits per weight, %s bytes of %s", 8 * used / weights, f"{used:,}", f"{budget:,}")
    return _rules(rules, choices, chosen)


def largest_grids(rules: list[Rule], skeleton: ModelSkeleton) -> list[Rule]:
    """Return the rules with the largest grid that each layer may get. Raises UserError if nothing is to be chosen."""
    choices = _choices(rules, skeleton)
    return _rules(rules, choices, [choice.costs.index(max(choice.costs)) for choice in choices])


def _losses(model: SwappedModel, choice: Choice) -> list[float]:
    """Return the KL of a choice's layers alone on each of its grids.

    The smallest and the middle one are measured. The others follow from the nearer of these by the ratio of squared
    errors of the layers' outputs, to which KL is proportional where it is small; rounding to nearest tells the ratio.
    """
    middle = len(choice.grids) // 2
    nearest: Plugin[Any] = QUANTIZERS.parse("rtn")
    measured: dict[int, float] = {}
    errors: list[float] = []
    for number, grid in enumerate(choice.grids):
        rounded = {name: model.quantised(name, grid, nearest) for name in choice.names}
        errors.append(sum(model.output_error(name, weight) for name, weight in rounded.items()))
        if number in {0, middle}:
            if choice.closed_form != nearest:
                rounded = {name: model.quantised(name, grid, choice.closed_form) for name in choice.names}
            measured[number] = model.kl(rounded)
    nearer = [0 if number < (middle + 1) // 2 else middle for number in range(len(choice.grids))]
    left = 1.0 if choice.layer.learned is None else _TRAINED
    return [
        left * measured[near] * error / max(errors[near], 1e-30) for near, error in zip(nearer, errors, strict=True)
    ]


def _joint(model: SwappedModel, choices: list[Choice], chosen: list[int]) -> float:
    """Return the KL with every layer on its chosen grid."""
    pairs = list(zip(choices, chosen, strict=True))
    return model.kl({name: model.quantised(name, c.grids[n], c.closed_form) for c, n in pairs for name in c.names})


def _uniform(choices: list[Choice], losses: list[list[float]], budget: int) -> list[int] | None:
    """Return the same grid for all choices of a rule, those of the rules chosen as those of layers are."""
    rules = sorted({choice.rule for choice in choices})
    costs: list[list[int]] = []
    sums: list[list[float]] = []
    for rule in rules:
        own = [n for n, choice in enumerate(choices) if choice.rule == rule]
        numbers = range(max(len(losses[n]) for n in own))
        costs.append([sum(choices[n].costs[min(number, len(losses[n]) - 1)] for n in own) for number in numbers])
        sums.append([sum(losses[n][min(number, len(losses[n]) - 1)] for n in own) for number in numbers])
    chosen = spend(costs, sums, budget)
    if chosen is None:
        return None
    of = dict(zip(rules, chosen, strict=True))
    return [min(of[choice.rule], len(choice.grids) - 1) for choice in choices]


def _options(rule: Rule, asked: bool) -> list[tuple[Setting, Grid]]:
    """Return the grids that a rule leaves to choose from; none if it is left as it is."""
    quantizer: dict[str, Any] = {"name": rule.quantizer} if isinstance(rule.quantizer, str) else rule.quantizer
    rest = {key: value for key, value in quantizer.items() if key in ("group_size", "symmetric")}
    listed = next((key for key in _LISTS if isinstance(quantizer.get(key), list)), None)
    if listed is None and (asked or quantizer["name"] == "fp"):
        return []
    key, values = listed or "bits", list[Any](_INTEGERS)
    if listed is not None:
        values = quantizer[listed]
    elif "grid" in quantizer:
        key, home = "grid", parse_grid({"grid": quantizer["grid"]})
        assert isinstance(home, NamedGrid)
        named = [name for name in GRIDS.names() if GRIDS.get(name).format == home.format]
        values = home.others() or named
    return [((key, value), parse_grid({**rest, key: value})) for value in values]


def _choices(rules: list[Rule], skeleton: ModelSkeleton) -> list[Choice]:
    quantizers = [rule.quantizer for rule in rules if isinstance(rule.quantizer, dict)]
    asked = any(isinstance(quantizer.get(key), list) for quantizer in quantizers for key in _LISTS)
    options = [[] if rule.match in STAGES.names() else _options(rule, asked) for rule in rules]
    found = []
    for number, shapes in enumerate(matched_layers(rules, skeleton)):
        if not options[number]:
            continue
        if rules[number].final_blocks > 1:
            raise UserError(f"plan[{number}]: final_blocks trains several as one, whose grids are not chosen; omit it.")
        together = {name: parts for parts in fused_parts(list(shapes)).values() for name in parts}
        for parts in dict.fromkeys(tuple(together.get(name, [name])) for name in shapes):
            fitting = [
                option for option in options[number] if all(option[1].divides(shapes[name][1]) for name in parts)
            ]
            if not fitting:
                raise UserError(f"plan[{number}]: none of its grids divides the inputs of {parts[0]}; add one.")
            by_cost = sorted(
                ((_bytes(grid, [shapes[n] for n in parts], skeleton), setting, grid) for setting, grid in fitting),
                key=lambda option: option[0],
            )
            costs, settings, grids = zip(*by_cost, strict=True)
            weights = sum(prod(shapes[name]) for name in parts)
            layer = parse_quantizer(_with(rules[number], settings[0]), known_grid=True)
            found.append(Choice(number, layer, parts, settings, grids, weights, costs))
    if not found:
        raise UserError("size: no rule of the plan leaves a grid to choose; give bits as a list, such as [2, 3, 4].")
    return found


def _bytes(grid: Grid, shapes: list[tuple[int, int]], skeleton: ModelSkeleton) -> int:
    """Return what layers of these shapes take on a grid."""
    scale_bits = 8 * skeleton.checkpoint.dtype.itemsize
    return sum(int(prod(shape) * grid.bits_per_weight(shape[1], scale_bits) / 8) for shape in shapes)


def _full_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of all tensors in the dtype that ships."""
    return checkpoint.dtype.itemsize * sum(prod(shape) for shape in checkpoint.shapes().values())


def _rules(rules: list[Rule], choices: list[Choice], chosen: list[int]) -> list[Rule]:
    """Return the plan: a rule for each grid that one of its layers takes, before the other rules' own."""
    found: list[Rule] = []
    for number, rule in enumerate(rules):
        own = [(c.names, c.settings[n]) for c, n in zip(choices, chosen, strict=True) if c.rule == number]
        if not own:
            found.append(rule)
            continue
        for key, value in sorted({repr(setting): setting for _, setting in own}.values(), key=repr):
            names = [name for layers, setting in own if setting == (key, value) for name in layers]
            match = rule.match if rule.match in OUTER else names
            found.append(replace(rule, match=match, quantizer=_with(rule, (key, value))))
    return found


def _with(rule: Rule, setting: Setting) -> dict[str, Any]:
    """Return a rule's quantizer on one of the grids."""
    base = {"name": rule.quantizer} if isinstance(rule.quantizer, str) else copy.deepcopy(rule.quantizer)
    dropped = {*_LISTS, "group_size", "symmetric"} if setting[0] == "grid" else set(_LISTS)
    return {**{option: given for option, given in base.items() if option not in dropped}, setting[0]: setting[1]}
