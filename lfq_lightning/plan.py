"""Plan: which quantizer and objective each block and layer gets. First match wins."""

import fnmatch
from dataclasses import dataclass
from typing import Any

from lfq_lightning.errors import UserError
from lfq_lightning.model_skeleton import ModelSkeleton
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantizers import QUANTIZERS, ClosedFormQuantizer, LearnedQuantizer
from lfq_lightning.registry import Plugin

_SCHEME_KEYS = {"bits": int, "group_size": int, "symmetric": bool}


@dataclass
class Rule:
    """One line of the plan, as YAML gives it.

    Args:
        match: `last`, `all`, a block index, or a glob on full layer names (`*.down_proj`).
        quantizer: a name, or `{name, bits, group_size, symmetric, …}` with the quantizer's own options; 4 bits, per
            output channel and symmetric if not said. A learned quantizer also takes `init`, a closed-form one.
        objective: a name, or `{name, …}`; what a learned quantizer minimises, and what every block reports.
        steps: optimisation steps of a learned quantizer.
        lr: peak learning rate; Adam, cosine to 0.
        batch_size: sequences per step.
    """

    match: int | str
    quantizer: str | dict[str, Any]
    objective: str | dict[str, Any] = "mse"
    steps: int = 200
    lr: float = 2e-3
    batch_size: int = 8


@dataclass(frozen=True)
class LayerPlan:
    """What one linear layer gets: a closed-form solution, and maybe training that starts from it."""

    scheme: QuantScheme
    closed_form: Plugin[ClosedFormQuantizer]
    learned: Plugin[LearnedQuantizer] | None


@dataclass(frozen=True)
class BlockPlan:
    """What one block gets. `layers` maps names inside the block; a linear layer not in it stays as it is."""

    index: int
    layers: dict[str, LayerPlan]
    objective: Plugin[Objective]
    steps: int
    lr: float
    batch_size: int

    @property
    def learned(self) -> bool:
        return any(layer.learned for layer in self.layers.values())


@dataclass(frozen=True)
class _ParsedRule:
    rule: Rule
    layer: LayerPlan
    objective: Plugin[Objective]
    where: str


@dataclass(frozen=True)
class _Outcome:
    """Which rules matched a layer, and which were the first to."""

    matched: set[str]
    won: set[str]


class Plan:
    """The rules, checked. Raises UserError for unknown names or options and for values that cannot be."""

    def __init__(self, rules: list[Rule]) -> None:
        if not rules:
            raise UserError("plan: it has no rule; give at least `- {match: all, quantizer: …}`.")
        self._rules = [_parse(rule, f"plan[{i}]") for i, rule in enumerate(rules)]

    def resolve(self, skeleton: ModelSkeleton) -> list[BlockPlan]:
        """Return the plan of each block. Raises UserError for a rule that matches nothing or a group that fits not."""
        outcome = _Outcome(set(), set())
        blocks = [self._resolve_block(skeleton, index, outcome) for index in range(len(skeleton))]
        for parsed in self._rules:
            if parsed.where in outcome.matched - outcome.won and parsed.rule.match != "all":
                raise UserError(
                    f"{parsed.where}: match {parsed.rule.match!r} is never used, since rules above it match all its "
                    "layers; the first match wins, so move it up."
                )
            if parsed.where not in outcome.matched:
                layers = ", ".join(list(skeleton.linear_shapes(0))[:2])
                raise UserError(
                    f"{parsed.where}: match {parsed.rule.match!r} matches nothing; use last, all, a block index from 0 "
                    f"to {len(skeleton) - 1}, or a glob on layer names such as {layers}."
                )
        return blocks

    def _resolve_block(self, skeleton: ModelSkeleton, index: int, outcome: "_Outcome") -> BlockPlan:
        layers: dict[str, LayerPlan] = {}
        used: list[_ParsedRule] = []
        last = index == len(skeleton) - 1
        prefix = f"{skeleton.block_name(index)}."
        for name, (_, in_features) in skeleton.linear_shapes(index).items():
            matching = [parsed for parsed in self._rules if _matches(parsed.rule.match, name, index, last)]
            outcome.matched.update(parsed.where for parsed in matching)
            if not matching:
                continue
            first = matching[0]
            outcome.won.add(first.where)
            _check_group(first, name, in_features, skeleton, index)
            layers[name.removeprefix(prefix)] = first.layer
            if first not in used:
                used.append(first)
        learned = [parsed for parsed in used if parsed.layer.learned]
        for parsed in learned[1:]:
            if _training(parsed) != _training(learned[0]):
                raise UserError(
                    f"{parsed.where} and {learned[0].where} both train block {index}, with different objective, "
                    "steps, lr or batch_size; make them equal."
                )
        if not used:
            used = [_parse(Rule(index, "rtn"), "")]  # nothing to do; it only reports
        lead = (learned or used)[0]
        rule = lead.rule
        return BlockPlan(index, layers, lead.objective, rule.steps, rule.lr, rule.batch_size)


def _training(parsed: _ParsedRule) -> tuple[Any, ...]:
    return parsed.objective, parsed.rule.steps, parsed.rule.lr, parsed.rule.batch_size


def _matches(match: int | str, layer: str, index: int, last: bool) -> bool:
    if isinstance(match, int):
        return match == index
    if match in {"last", "all"}:
        return match == "all" or last
    return fnmatch.fnmatchcase(layer, match)


def _parse(rule: Rule, where: str) -> _ParsedRule:
    try:
        for name, least in (("steps", 1), ("batch_size", 1)):
            if vars(rule)[name] < least:
                raise UserError(f"{name}: {vars(rule)[name]} must be at least {least}.")
        if not rule.lr > 0:
            raise UserError(f"lr: {rule.lr} must be positive.")
        layer = _parse_quantizer(rule.quantizer)
        objective = OBJECTIVES.parse(rule.objective)
        objective.build()  # its own checks of its options speak now, not hours later
        return _ParsedRule(rule, layer, objective, where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _parse_quantizer(value: str | dict[str, Any]) -> LayerPlan:
    given = {"name": value} if isinstance(value, str) else dict(value)
    keys: dict[str, Any] = {key: given.pop(key) for key in _SCHEME_KEYS if key in given}
    for key, value in keys.items():
        if type(value) is not _SCHEME_KEYS[key]:
            raise UserError(f"quantizer: {key} is {value!r}, but must be of type {_SCHEME_KEYS[key].__name__}.")
    scheme = QuantScheme(**{"num_bits" if key == "bits" else key: value for key, value in keys.items()})
    cls = QUANTIZERS.get(given["name"]) if isinstance(given.get("name"), str) else None
    if cls is None or not issubclass(cls, LearnedQuantizer):
        return LayerPlan(scheme, _closed_form(QUANTIZERS.parse(given, _SCHEME_KEYS)), None)
    init = QUANTIZERS.parse(given.pop("init", cls.default_init))
    learned: Plugin[Any] = QUANTIZERS.parse(given, {*_SCHEME_KEYS, "init"})
    return LayerPlan(scheme, _closed_form(init), learned)


def _closed_form(plugin: Plugin[Any]) -> Plugin[ClosedFormQuantizer]:
    if not issubclass(plugin.cls, ClosedFormQuantizer):
        raise UserError(
            f"quantizer: init {plugin.name!r} is itself learned; start from a closed-form one such as gptq."
        )
    return plugin


def _check_group(parsed: _ParsedRule, name: str, in_features: int, skeleton: ModelSkeleton, index: int) -> None:
    size = parsed.layer.scheme.group_size
    if size == -1 or in_features % size == 0:
        return
    widths = {i for _, i in skeleton.linear_shapes(index).values()}
    fitting = [str(k) for k in range(16, min(widths) + 1) if all(width % k == 0 for width in widths)]
    raise UserError(
        f"{parsed.where}: group_size {size} does not divide the {in_features} inputs of {name}; "
        f"sizes that fit all its block's layers: {', '.join(fitting)}, or -1 (per output channel)."
    )
