"""Plan: which quantizer and objective each block and layer gets. First match wins."""

import fnmatch
from dataclasses import dataclass
from typing import Any

from lfq_lightning.errors import UserError, require
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.objectives.weighted_sum import WeightedSum
from lfq_lightning.optimizers import DEFAULT_LR
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantizers import QUANTIZERS, ClosedFormQuantizer, DenseQuantizer, LearnedQuantizer
from lfq_lightning.registry import Plugin, did_you_mean

WHOLE = "whole"
_SCHEME_KEYS = {"bits": int, "group_size": int, "symmetric": bool}


@dataclass
class Rule:
    """One line of the plan, as YAML gives it.

    Args:
        match: `last`, `all`, a block index, a glob on full layer names (`*.down_proj`), or a list of globs; or `whole`:
            once all blocks are done, all of them together are trained from what they would ship as.
        quantizer: a name, or `{name, bits, group_size, symmetric, …}` with the quantizer's own options; 4 bits, per
            output channel and symmetric if not said. A learned quantizer also takes `init`, a closed-form one. With
            `match: whole` a learned one, without these: the grids are there.
        objective: a name, or `{name, …}`; what a learned quantizer minimises, and what every block reports. A list of
            them, each with a `weight`, is their weighted sum.
        steps: optimisation steps of a learned quantizer.
        lr: peak learning rate; 2e-3 for adam, 1 / steps for sign_sgd if not said.
        batch_size: sequences per step.
        optimizer: `adam` with a cosine to 0, `adamw8bit` (the same with a state of 8 bits, through bitsandbytes), or
            `sign_sgd` with a line to 0; the quantizer's own if not said.
        final_blocks: with `match: last`, how many of the last blocks are trained together as one.
        activation_checkpointing: run each decoder layer again in the backward pass instead of keeping its activations.
    """

    match: int | str | list[str]
    quantizer: str | dict[str, Any]
    objective: str | dict[str, Any] | list[dict[str, Any]] = "mse"
    steps: int = 200
    lr: float | None = None
    batch_size: int = 8
    optimizer: str | None = None
    final_blocks: int = 1
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """What one linear layer gets: a closed-form solution, and maybe training that starts from it."""

    scheme: QuantScheme
    closed_form: Plugin[ClosedFormQuantizer] | Plugin[DenseQuantizer]
    learned: Plugin[LearnedQuantizer] | None

    @property
    def needs_reference(self) -> bool:
        cls = self.closed_form.cls
        return issubclass(cls, ClosedFormQuantizer) and cls.needs_reference(self.closed_form.options)


@dataclass(frozen=True)
class BlockPlan:
    """What one block gets. `layers` maps full names; a linear layer not in it stays as it is.

    Args:
        index: its place in the run.
        indices: the decoder layers in it; one, or the last few as one block, or all once more.
    """

    index: int
    indices: range
    layers: dict[str, LayerPlan]
    objective: Plugin[Objective]
    steps: int
    lr: float
    batch_size: int
    optimizer: str
    activation_checkpointing: bool

    @property
    def whole(self) -> bool:
        """It trains all blocks, which are done by then, once more."""
        return self.index != self.indices[0]

    @property
    def solved(self) -> dict[str, LayerPlan]:
        """The layers that are solved in closed form; of the whole none, whose codes are there."""
        return {} if self.whole else self.layers

    @property
    def learned(self) -> bool:
        return any(layer.learned for layer in self.layers.values())

    @property
    def needs_reference(self) -> bool:
        return any(layer.needs_reference for layer in self.solved.values())

    @property
    def logit_space(self) -> bool:
        return self.objective.build().logit_space


@dataclass(frozen=True)
class _ParsedRule:
    rule: Rule
    layer: LayerPlan
    objective: Plugin[Objective]
    optimizer: str
    lr: float
    where: str

    @property
    def training(self) -> tuple[Any, ...]:
        """What rules that train one block must agree on."""
        rule = self.rule
        return self.objective, rule.steps, self.lr, rule.batch_size, self.optimizer, rule.activation_checkpointing

    def plan(self, index: int, indices: range, layers: dict[str, LayerPlan], skeleton: ModelSkeleton) -> BlockPlan:
        """Return a block's plan by this rule. Raises UserError for an objective that the model's head cannot have."""
        if self.objective.build().linear_head_only and skeleton.logit_terms[1] is not None:
            raise UserError(
                f"{self.where}: objective {self.objective.name} cannot do with this model's soft-capped logits; use "
                "logit_ce."
            )
        objective, steps, lr, batch_size, optimizer, checkpointing = self.training
        return BlockPlan(index, indices, layers, objective, steps, lr, batch_size, optimizer, checkpointing)


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
        parsed = [_parse(rule, f"plan[{i}]") for i, rule in enumerate(rules)]
        self._rules = [each for each in parsed if each.rule.match != WHOLE]
        self._whole = [each for each in parsed if each.rule.match == WHOLE]
        if len(self._whole) > 1:
            raise UserError(f"{self._whole[1].where}: match whole is there twice; one such training ends a run.")
        self._final_blocks = max((rule.final_blocks for rule in rules), default=1)

    def resolve(self, skeleton: ModelSkeleton) -> list[BlockPlan]:
        """Return the plan of each block. Raises UserError for a rule that matches nothing or a group that fits not."""
        if self._final_blocks > len(skeleton):
            raise UserError(f"plan: final_blocks {self._final_blocks} is more than the model's {len(skeleton)} blocks.")
        outcome = _Outcome(set(), set())
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
                    f"{parsed.where}: match {parsed.rule.match!r} matches nothing; use last, all, whole, a block index "
                    f"from 0 to {len(skeleton) - 1}, or a glob on layer names such as {layers}."
                )
        return plans + [_whole_plan(parsed, skeleton, plans) for parsed in self._whole]

    def _resolve_block(self, skeleton: ModelSkeleton, indices: range, outcome: "_Outcome") -> BlockPlan:
        layers: dict[str, LayerPlan] = {}
        used: list[_ParsedRule] = []
        last = len(skeleton) - 1 in indices
        for index in indices:
            for name in skeleton.linear_shapes(index):
                matching = [parsed for parsed in self._rules if _matches(parsed.rule.match, name, index, last)]
                outcome.matched.update(parsed.where for parsed in matching)
                if not matching:
                    continue
                first = matching[0]
                outcome.won.add(first.where)
                check_group(first.layer.scheme, name, skeleton, index, first.where)
                if first.layer.needs_reference and ".experts." in name:
                    raise UserError(
                        f"{first.where}: an expert sees the tokens that its router sends it, and full precision sends "
                        "others, so nothing can be corrected towards it; leave `correct` away for experts."
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
            return BlockPlan(indices[0], indices, {}, OBJECTIVES.parse("mse"), 1, 0.0, Rule.batch_size, "adam", False)
        lead = (learned or used)[0]
        plan = lead.plan(indices[0], indices, layers, skeleton)
        if plan.logit_space and not last:
            raise UserError(
                f"{lead.where}: objective {plan.objective.name} compares token distributions, but block {indices[0]} "
                "is not the last; use `match: last` for it, with `final_blocks: k` to train the last k blocks together."
            )
        return plan


def _whole_plan(parsed: _ParsedRule, skeleton: ModelSkeleton, plans: list[BlockPlan]) -> BlockPlan:
    """Return the plan of a last training of all that `plans` quantise to integers."""
    learned = parsed.layer.learned
    assert learned is not None, "the rule has been checked"
    layers = {
        name: LayerPlan(layer.scheme, layer.closed_form, learned)
        for plan in plans
        for name, layer in plan.layers.items()
        if not issubclass(layer.closed_form.cls, DenseQuantizer)
    }
    if not layers:
        raise UserError(f"{parsed.where}: match whole trains what other rules have quantised, and none does.")
    try:
        for layer in layers.values():
            learned.cls.check(layer.scheme, learned.options)
    except UserError as error:
        raise UserError(f"{parsed.where}: {error}") from error
    return parsed.plan(len(plans), range(len(skeleton)), layers, skeleton)


def _matches(match: int | str | list[str], layer: str, index: int, last: bool) -> bool:
    if isinstance(match, int):
        return match == index
    if isinstance(match, list):
        return any(fnmatch.fnmatchcase(layer, glob) for glob in match)
    if match in {"last", "all"}:
        return match == "all" or last
    return fnmatch.fnmatchcase(layer, match)


def _parse(rule: Rule, where: str) -> _ParsedRule:
    try:
        for name in ("steps", "batch_size", "final_blocks"):
            if vars(rule)[name] < 1:
                raise UserError(f"{name}: {vars(rule)[name]} must be at least 1.")
        if rule.final_blocks > 1 and rule.match != "last":
            raise UserError("final_blocks: it goes with `match: last` only.")
        if rule.match == WHOLE and isinstance(rule.quantizer, dict) and {*_SCHEME_KEYS, "init"} & set(rule.quantizer):
            raise UserError(
                "match whole goes on from the codes and grids that are there; leave bits, group_size, "
                "symmetric and init to the other rules."
            )
        if rule.lr is not None and not rule.lr > 0:
            raise UserError(f"lr: {rule.lr} must be positive.")
        layer = _parse_quantizer(rule.quantizer, known_grid=rule.match != WHOLE)
        if rule.match == WHOLE and (layer.learned is None or layer.learned.cls.learns_positions):
            raise UserError(
                "match whole trains what codes and grids tell of a weight, not where it lay between two levels; use "
                "`scales`, `block_ap` or `flexround`."
            )
        optimizer = rule.optimizer or (layer.learned.cls.default_optimizer if layer.learned else "adam")
        if optimizer not in DEFAULT_LR:
            raise UserError(f"unknown optimizer {optimizer!r}: {did_you_mean(optimizer, DEFAULT_LR)}")
        if optimizer == "adamw8bit":
            require("bitsandbytes", "optimizer adamw8bit")
        lr = rule.lr if rule.lr is not None else DEFAULT_LR[optimizer](rule.steps)
        return _ParsedRule(rule, layer, _parse_objective(rule.objective), optimizer, lr, where)
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


def _parse_quantizer(value: str | dict[str, Any], known_grid: bool) -> LayerPlan:
    given = {"name": value} if isinstance(value, str) else dict(value)
    keys: dict[str, Any] = {key: given.pop(key) for key in _SCHEME_KEYS if key in given}
    for key, value in keys.items():
        if type(value) is not _SCHEME_KEYS[key]:
            raise UserError(f"quantizer: {key} is {value!r}, but must be of type {_SCHEME_KEYS[key].__name__}.")
    scheme = QuantScheme(**{"num_bits" if key == "bits" else key: value for key, value in keys.items()})
    cls = QUANTIZERS.get(given["name"]) if isinstance(given.get("name"), str) else None
    if cls is None or not issubclass(cls, LearnedQuantizer):
        plugin: Plugin[Any] = QUANTIZERS.parse(given, _SCHEME_KEYS)
        plugin.cls.check(scheme, plugin.options)
        return LayerPlan(scheme, plugin, None)
    init = given.pop("init", cls.default_init)
    start = init.get("name") if isinstance(init, dict) else init
    if isinstance(start, str) and not issubclass(QUANTIZERS.get(start), ClosedFormQuantizer):
        raise UserError(
            f"quantizer: init {start!r} does not solve for codes (it is learned, or keeps dense weights); start from a "
            "closed-form one such as gptq."
        )
    learned: Plugin[Any] = QUANTIZERS.parse(given, {*_SCHEME_KEYS, "init"})
    closed_form: Plugin[Any] = QUANTIZERS.parse(init)
    if known_grid:
        learned.cls.check(scheme, learned.options)
        closed_form.cls.check(scheme, closed_form.options)
    return LayerPlan(scheme, closed_form, learned)


def check_group(scheme: QuantScheme, name: str, skeleton: ModelSkeleton, index: int, where: str) -> None:
    """Raise UserError, beginning with `where`, if the groups do not divide the inputs of a layer of block `index`."""
    size, in_features = scheme.group_size, skeleton.linear_shapes(index)[name][1]
    if size == -1 or in_features % size == 0:
        return
    widths = {i for _, i in skeleton.linear_shapes(index).values()}
    fitting = [str(k) for k in range(16, min(widths) + 1) if all(width % k == 0 for width in widths)]
    raise UserError(
        f"{where}: group_size {size} does not divide the {in_features} inputs of {name}; "
        f"what fits all its block's layers: {', '.join([*fitting, '-1'])} (-1: per output channel)."
    )


def _check_folds(skeleton: ModelSkeleton, indices: range, layers: dict[str, LayerPlan]) -> None:
    """Raise UserError if scales cannot be folded: no pairs for the family, or only some readers of a tensor want it."""
    wanting = {name: layer for name, layer in layers.items() if layer.closed_form.cls.scales_inputs}
    if not wanting:
        return
    checkpoint, plugin = skeleton.checkpoint, next(iter(wanting.values())).closed_form.name
    if not checkpoint.family.folds:
        raise UserError(
            f"{plugin} folds scales into other layers, and no such pairs are known of {checkpoint.config.model_type}; "
            "add `folds` to its row in families.py, or use gptq."
        )
    for index in indices:
        for _, readers in checkpoint.family.folds:
            names = [f"{skeleton.block_name(index)}.{reader}" for reader in readers]
            plans = [(wanting[name].scheme, wanting[name].closed_form.cls) for name in names if name in wanting]
            if plans and (len(plans) < len(names) or any(plan != plans[0] for plan in plans)):
                raise UserError(
                    f"{', '.join(names)} read one tensor, so {plugin} scales all of them or none, for one grid; give "
                    "them one rule."
                )
