"""The rows of the comparison: what each method's plan is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Plan = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A grid, and how long learned methods train."""

    bits: int
    group_size: int
    symmetric: bool
    steps: int
    batch_size: int
    recipe: tuple[int, int, int]  # its steps a block, those on the last, its batch size

    def quantizer(self, name: str, **options: Any) -> dict[str, Any]:
        grid = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {"name": name, **grid, **options}

    def training(self, lr: float | None = None) -> dict[str, Any]:
        return {"steps": self.steps, "batch_size": self.batch_size, **({"lr": lr} if lr else {})}


def _everywhere(
    name: str, lr: float | None = None, objective: Any = "mse", **options: Any
) -> Callable[[Setting], Plan]:
    return lambda s: [
        {"match": "all", "quantizer": s.quantizer(name, **options), "objective": objective, **s.training(lr)}
    ]


def _last_by(name: str, objective: Any) -> Callable[[Setting], Plan]:
    """The method, its last block by another objective; after GPTQ's blocks that is FlexRound from GPTQ's codes."""

    def plan(setting: Setting) -> Plan:
        rest = _everywhere(name)(setting)
        trained = setting.quantizer("flexround", init="gptq") if name == "gptq" else rest[0]["quantizer"]
        last = {"match": "last", "quantizer": trained, "objective": objective, **setting.training()}
        return [last, *rest]

    return plan


def _recipe(setting: Setting) -> Plan:
    quantizer = setting.quantizer("adaround", init="awq")
    steps, last, batch_size = setting.recipe
    rest = {"match": "all", "quantizer": quantizer, "objective": NORMALISED, "steps": steps, "batch_size": batch_size}
    return [{**rest, "match": "last", "objective": RECIPE_LAST, "steps": last}, rest]


def _fast(setting: Setting) -> Plan:
    """What the `fast-*` presets have: GPTQ that corrects the prefix's error, and the recipe's last block from it."""
    gptq = {"name": "gptq", "correct": 1.0, "act_order": "group", "scale_by": "diagonal"}
    _, last, batch_size = setting.recipe
    training = {"objective": RECIPE_LAST, "steps": last // 2, "batch_size": batch_size}
    grid = {key: value for key, value in setting.quantizer("gptq").items() if key != "name"}
    return [
        {"match": "last", "quantizer": setting.quantizer("adaround", init=gptq), **training},
        {"match": "all", "quantizer": {**gptq, **grid}},
    ]


NORMALISED = {"name": "mse", "normalised": True}
ANCHORED = [{"name": "logit_ce", "weight": 1}, {**NORMALISED, "weight": 5}]
RECIPE_LAST = [{"name": "logit_ce", "weight": 1, "coverage": 0.99}, *ANCHORED[1:]]
RECIPE = "recipe"
_BASES = ("gptq", "flexround", "omniquant", "block_ap")
METHODS: dict[str, Callable[[Setting], Plan]] = {
    "rtn": _everywhere("rtn"),
    "nf4": lambda _: [{"match": "all", "quantizer": "nf4"}],
    "awq": _everywhere("awq"),
    **{
        f"{name}{suffix}": _last_by(name, "logit_ce") if suffix else _everywhere(name)
        for name in _BASES
        for suffix in ("", "+lfq")
    },
    RECIPE: _recipe,
    "fast": _fast,
}

# the last block by other objectives, and FlexRound's blocks by other squared errors
ABLATIONS: dict[str, Callable[[Setting], Plan]] = {
    **{f"{name}+lfq anchored": _last_by(name, ANCHORED) for name in _BASES},
    **{
        f"flexround+{name}": _last_by("flexround", name)
        for name in ("kl", "reverse_kl", "js", "topk_kl", "logit_mse", "hard_ce")
    },
    **{f"gptq correct {share}": _everywhere("gptq", correct=share) for share in (0.25, 1.0)},
    "flexround normalised": _everywhere("flexround", objective=NORMALISED),
    "flexround massive": _everywhere("flexround", objective={"name": "mse", "massive": 100.0}),
}
