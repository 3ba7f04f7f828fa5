"""Plan: which quantizer and objective each block and layer gets. First match wins."""

import fnmatch
import logging
from dataclasses import dataclass
from math import prod
from typing import Any

from lfq_lightning.errors import UserError, require
from lfq_lightning.formats import FORMATS
from lfq_lightning.formats.named import format_of
from lfq_lightning.grids import GRIDS, Grid, IntegerGrid, NamedGrid
from lfq_lightning.models.experts import in_expert
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.objectives.weighted_sum import WeightedSum
from lfq_lightning.optimizers import OPTIMIZERS
from lfq_lightning.quantizers import QUANTIZERS, ClosedFormQuantizer, DenseQuantizer, LearnedQuantizer
from lfq_lightning.registry import Plugin, did_you_mean, plugin_name
from lfq_lightning.stages import STAGES, BlockPlan, LaterStage, LayerPlan, ParsedRule, Rule
from lfq_lightning.stages.block_by_block import BlockByBlock

log = logging.getLogger(__name__)

OUTER = ("embeddings", "head")
_SMALL = 0.05  # of a block's weights in linear layers
_INTEGER_KEYS = {"bits": int, "group_size": int, "symmetric": bool}
_SCHEME_KEYS = {*_INTEGER_KEYS, "grid"}


@dataclass(frozen=True)
class _Outcome:
    """Which rules matched a layer, which were the first to, and which layers stay in full precision all the same."""

    matched: set[str]
    won: set[str]
    left: list[str]


class Plan:
    """The rules, checked. Raises UserError for unknown names or options and for values that cannot be.

    Attributes:
        format: how a run packs layers: the format that has all their grids.
    """

    def __init__(self, rules: list[Rule]) -> None:
        if not rules:
            raise UserError("plan: it has no rule; give at least `- {match: all, quantizer: …}`.")
        parsed = [_parse(rule, f"plan[{i}]") for i, rule in enumerate(rules)]
        self._rules = [each for each in parsed if not isinstance(each.stage, LaterStage)]
        self._outer = [each for each in self._rules if each.rule.match in OUTER]
        self._rules = [each for each in self._rules if each.rule.match not in OUTER]
        self._later = [each for each in parsed if isinstance(each.stage, LaterStage)]
        if len(self._later) > 1:
            raise UserError(
                f"{self._later[1].where}: match {self._later[1].rule.match} comes after match "
                f"{self._later[0].rule.match}; one such stage ends a run."
            )
        on_grids = [each for each in [*self._rules, *self._outer] if not _dense(each)]
        self.format = FORMATS.get(format_of({each.where: each.layer.scheme for each in on_grids}))()
        for each in self._outer:
            self._check_outer(each)
        self._final_blocks = max((rule.final_blocks for rule in rules), default=1)

    def resolve(self, skeleton: ModelSkeleton) -> list[BlockPlan]:
        """Return the plan of each block. Raises UserError for a rule that matches nothing or cannot be followed."""
        if self._final_blocks > len(skeleton):
            raise UserError(f"plan: final_blocks {self._final_blocks} is more than the model's {len(skeleton)} blocks.")
        outcome = _Outcome(set(), set(), [])
        single = len(skeleton) - self._final_blocks
        blocks = [range(index, index + 1) for index in range(single)] + [range(single, len(skeleton))]
        plans = [self._resolve_block(skeleton, indices, outcome) for indices in blocks]
        for parsed in self._rules:
            if parsed.where in outcome.matched - outcome.won and parsed.rule.match != "all":
                raise UserError(
                    f"{parsed.where}: match {parsed.rule.match!r} is never used, since rules above it match all its "
                    "layers; the first match wins, so move it up."
                )
            if parsed.where not in outcome.matched:
                layers = ", ".join(list(skeleton.linear_shapes(0))[:2])
                raise UserError(
                    f"{parsed.where}: match {parsed.rule.match!r} matches nothing; use last, all, "
                    f"{', '.join(STAGES.names())}, a block index from 0 to {len(skeleton) - 1}, or a glob on layer "
                    f"names such as {layers}."
                )
        if outcome.left:
            log.warning(
                "plan: %d small layers, such as %s, stay in full precision: group_size does not divide their inputs",
                len(outcome.left),
                outcome.left[0],
            )
        for parsed in self._later:
            assert isinstance(parsed.stage, LaterStage)
            plans.append(parsed.stage.plan(parsed, skeleton, plans))
        return plans

    def outer(self, skeleton: ModelSkeleton) -> dict[str, LayerPlan]:
        """Return the plan of embeddings and head by full name, if they have one. Raises UserError."""
        found: dict[str, ParsedRule] = {}
        for parsed in self._outer:
            name = skeleton.outer_layers[str(parsed.rule.match)]
            kind = "embeddings" if name == skeleton.outer_layers["embeddings"] else "head"
            if kind not in self.format.outer:
                raise UserError(
                    f"{parsed.where}: {plugin_name(type(self.format))} holds no quantised {kind}"
                    f"{', which is the head as well' if skeleton.checkpoint.tied else ''}; take a grid of "
                    f"{' or '.join(n for n in FORMATS.names() if kind in FORMATS.get(n).outer)}."
                )
            if name != skeleton.outer_layers["head"] and parsed.layer.closed_form.cls.needs_inputs:
                raise UserError(
                    f"{parsed.where}: embeddings that are not the head as well have tokens for inputs, of which "
                    f"{parsed.layer.closed_form.name} learns nothing; take a data-free quantizer such as rtn."
                )
            other = found.setdefault(name, parsed)
            if other.layer != parsed.layer:
                raise UserError(f"{other.where} and {parsed.where}: embeddings and head are one tensor; give one rule.")
            width = skeleton.outer_shape(name)[1]
            if not parsed.layer.scheme.divides(width):
                fitting = [grid for grid in GRIDS.names() if GRIDS.get(grid)().divides(width)]
                raise UserError(
                    f"{parsed.where}: {parsed.layer.scheme} does not divide the {width} inputs of {name}; what fits: "
                    f"{', '.join(fitting)}."
                )
        return {name: parsed.layer for name, parsed in found.items()}

    def _check_outer(self, parsed: ParsedRule) -> None:
        cls = parsed.layer.closed_form.cls
        if parsed.layer.learned or _dense(parsed) or cls.scales_inputs or parsed.layer.needs_reference:
            raise UserError(
                f"{parsed.where}: match {parsed.rule.match} takes a closed-form quantizer that folds and corrects "
                "nothing, such as gptq or rtn: it is solved first, and the blocks are calibrated with it."
            )

    def _resolve_block(self, skeleton: ModelSkeleton, indices: range, outcome: "_Outcome") -> BlockPlan:
        layers: dict[str, LayerPlan] = {}
        used: list[ParsedRule] = []
        last = len(skeleton) - 1 in indices
        for index in indices:
            for name in skeleton.linear_shapes(index):
                matching = [parsed for parsed in self._rules if matches(parsed.rule.match, name, index, last)]
                outcome.matched.update(parsed.where for parsed in matching)
                if not matching:
                    continue
                first = matching[0]
                outcome.won.add(first.where)
                if _is_left(first.layer.scheme, name, skeleton, index):
                    outcome.left.append(name)
                    continue
                check_group(first.layer.scheme, name, skeleton, index, first.where)
                if first.layer.needs_reference and in_expert(name):
                    raise UserError(
                        f"{first.where}: an expert sees the tokens that its router sends it, and full precision sends "
                        "others, so nothing can be corrected towards it; omit `correct` for experts."
                    )
                layers[name] = first.layer
                if first not in used:
                    used.append(first)
        _check_folds(skeleton, indices, layers)
        learned = [parsed for parsed in used if parsed.layer.learned]
        for parsed in learned[1:]:
            if parsed.training != learned[0].training:
                raise UserError(
                    f"{parsed.where} and {learned[0].where} both train block {indices[0]}, with different objective, "
                    "steps, lr, batch_size, optimizer or activation_checkpointing; make them equal."
                )
        if not used:  # nothing to do; it only reports
            mse = OBJECTIVES.parse("mse")
            return BlockPlan(BlockByBlock(), indices[0], indices, {}, mse, 1, 0.0, Rule.batch_size, "adam", False)
        lead = (learned or used)[0]
        plan = lead.plan(indices[0], indices, layers, skeleton)
        if plan.logit_space and not last:
            raise UserError(
                f"{lead.where}: objective {plan.objective.name} compares token distributions, but block {indices[0]} "
                "is not the last; use `match: last` for it, with `final_blocks: k` to train the last k blocks together."
            )
        return plan


def _dense(parsed: ParsedRule) -> bool:
    return issubclass(parsed.layer.closed_form.cls, DenseQuantizer)


def matches(match: int | str | list[str], layer: str, index: int, last: bool) -> bool:
    """Tell whether a rule's `match` means a layer of block `index`."""
    if isinstance(match, int):
        return match == index
    if isinstance(match, list):
        return any(fnmatch.fnmatchcase(layer, glob) for glob in match)
    if match in {"last", "all"}:
        return match == "all" or last
    return fnmatch.fnmatchcase(layer, match)


def _parse(rule: Rule, where: str) -> ParsedRule:
    stage = STAGES.get(rule.match)() if isinstance(rule.match, str) and rule.match in STAGES.names() else BlockByBlock()
    try:
        for name in ("steps", "batch_size", "final_blocks"):
            if vars(rule)[name] < 1:
                raise UserError(f"{name}: {vars(rule)[name]} must be at least 1.")
        if rule.final_blocks > 1 and rule.match != "last":
            raise UserError("final_blocks: it goes with `match: last` only.")
        if rule.lr is not None and not rule.lr > 0:
            raise UserError(f"lr: {rule.lr} must be positive.")
        layer = parse_quantizer(rule.quantizer, known_grid=not stage.from_shards)
        if isinstance(stage, LaterStage):
            stage.check(rule, layer)
        optimizer = rule.optimizer or (layer.learned.cls.default_optimizer if layer.learned else "adam")
        if optimizer not in OPTIMIZERS:
            raise UserError(f"unknown optimizer {optimizer!r}: {did_you_mean(optimizer, OPTIMIZERS)}")
        kind = OPTIMIZERS[optimizer]
        if kind.needs is not None:
            require(kind.needs, f"optimizer {optimizer}")
        lr = rule.lr if rule.lr is not None else kind.lr(rule.steps)
        return ParsedRule(stage, rule, layer, _parse_objective(rule.objective), optimizer, lr, where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _parse_objective(value: str | dict[str, Any] | list[dict[str, Any]]) -> Plugin[Objective]:
    if not isinstance(value, list):
        objective = OBJECTIVES.parse(value)
    else:
        terms = []
        for term in value:
            if not isinstance(term, dict) or not isinstance(term.get("weight"), int | float) or not term["weight"] > 0:
                raise UserError("objective: each term of a sum is `{name: …, weight: …}` with a positive weight.")
            rest = {key: option for key, option in term.items() if key != "weight"}
            terms.append((OBJECTIVES.parse(rest, ["weight"]), float(term["weight"])))
        if not terms:
            raise UserError("objective: the list is empty; give a name, or terms `{name: …, weight: …}`.")
        objective = Plugin("+".join(plugin.name for plugin, _ in terms), WeightedSum, {"terms": tuple(terms)})
    objective.build()  # its own checks of its options speak now, not hours later
    return objective


def parse_quantizer(value: str | dict[str, Any], known_grid: bool) -> LayerPlan:
    """Return what a rule's `quantizer` in YAML says; its grid is checked only if `known_grid`. Raises UserError."""
    options = {"name": value} if isinstance(value, str) else dict(value)
    scheme = parse_grid({key: options.pop(key) for key in sorted(_SCHEME_KEYS) if key in options})
    cls = QUANTIZERS.get(options["name"]) if isinstance(options.get("name"), str) else None
    if cls is None or not issubclass(cls, LearnedQuantizer):
        plugin: Plugin[Any] = QUANTIZERS.parse(options, _SCHEME_KEYS)
        plugin.cls.check(scheme, plugin.options)
        return LayerPlan(scheme, plugin, None)
    init = options.pop("init", cls.default_init)
    start = init.get("name") if isinstance(init, dict) else init
    if isinstance(start, str) and not issubclass(QUANTIZERS.get(start), ClosedFormQuantizer):
        raise UserError(
            f"quantizer: init {start!r} does not solve for codes (it is learned, or keeps dense weights); start from a "
            "closed-form one such as gptq."
        )
    learned: Plugin[Any] = QUANTIZERS.parse(options, {*_SCHEME_KEYS, "init"})
    closed_form: Plugin[Any] = QUANTIZERS.parse(init)
    if known_grid:
        learned.cls.check(scheme, learned.options)
        closed_form.cls.check(scheme, closed_form.options)
    return LayerPlan(scheme, closed_form, learned)


def parse_grid(keys: dict[str, Any]) -> Grid:
    """Return the grid that a quantizer's keys name: `grid`, or `bits`, `group_size`, `symmetric`. Raises UserError."""
    several = next((key for key, value in keys.items() if isinstance(value, list)), None)
    if several is not None:
        raise UserError(f"quantizer: {several} {keys[several]} is a choice, which needs `size` or `average_bits`.")
    named = keys.pop("grid", None)
    if named is not None:
        if keys:
            raise UserError(f"quantizer: grid {named} has bits and groups of its own; omit {', '.join(keys)}.")
        return GRIDS.parse(named).build()
    for key, value in keys.items():
        if type(value) is not _INTEGER_KEYS[key]:
            raise UserError(f"quantizer: {key} is {value!r}, but must be of type {_INTEGER_KEYS[key].__name__}.")
    return IntegerGrid(**{"num_bits" if key == "bits" else key: value for key, value in keys.items()})


def _is_left(scheme: Grid, name: str, skeleton: ModelSkeleton, index: int) -> bool:
    """Tell whether a layer that the groups do not divide is small beside its block: not worth another group size."""
    shapes = skeleton.linear_shapes(index)
    return not scheme.divides(shapes[name][1]) and prod(shapes[name]) < _SMALL * sum(map(prod, shapes.values()))


def check_group(scheme: Grid, name: str, skeleton: ModelSkeleton, index: int, where: str) -> None:
    """Raise UserError, beginning with `where`, if the groups do not divide the inputs of a layer of block `index`."""
    in_features = skeleton.linear_shapes(index)[name][1]
    if scheme.divides(in_features):
        return
    widths = {i for _, i in skeleton.linear_shapes(index).values()}
    if isinstance(scheme, NamedGrid):
        grids = [grid for grid in GRIDS.names() if all(map(GRIDS.get(grid)().divides, widths))]
        raise UserError(
            f"{where}: grid {scheme} stores {scheme.unit} inputs together, which do not divide the {in_features} of "
            f"{name}; give such layers a rule of their own. What fits all its block's layers: "
            f"{', '.join(grids) or 'no named grid'}."
        )
    fitting = [str(k) for k in range(16, min(widths) + 1) if all(width % k == 0 for width in widths)]
    raise UserError(
        f"{where}: group_size {scheme.group_size} does not divide the {in_features} inputs of {name}; "
        f"what fits all its block's layers: {', '.join([*fitting, '-1'])} (-1: per output channel)."
    )


def _check_folds(skeleton: ModelSkeleton, indices: range, layers: dict[str, LayerPlan]) -> None:
    """Raise UserError if scales cannot be folded: no pairs in the family, or only some readers of a tensor want it."""
    wanting = {name: layer for name, layer in layers.items() if layer.closed_form.cls.scales_inputs}
    if not wanting:
        return
    checkpoint, plugin = skeleton.checkpoint, next(iter(wanting.values())).closed_form.name
    if checkpoint.family.folds == ():
        raise UserError(
            f"{plugin} folds scales into other layers, and no such pairs are known of {checkpoint.config.model_type}; "
            "add `folds` to its row in families.py, or None to have them found, or use gptq."
        )
    for index in indices:
        for _, readers in checkpoint.family.folds or ():
            names = [f"{skeleton.block_name(index)}.{reader}" for reader in readers]
            plans = [(wanting[name].scheme, wanting[name].closed_form.cls) for name in names if name in wanting]
            if plans and (len(plans) < len(names) or any(plan != plans[0] for plan in plans)):
                raise UserError(
                    f"{', '.join(names)} read one tensor, so {plugin} scales all of them or none, for one grid; give "
                    "them one rule."
                )
