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


def _with_lfq(name: str, lr: float | None = None, **options: Any) -> Callable[[Setting], Plan]:
    def plan(setting: Setting) -> Plan:
        rest = _everywhere(name, lr, **options)(setting)
        return [{**rest[0], "match": "last", "objective": "logit_ce"}, *rest]

    return plan


def _gptq_lfq(setting: Setting) -> Plan:
    last = {"match": "last", "quantizer": setting.quantizer("flexround", init="gptq"), "objective": "logit_ce"}
    return [{**last, **setting.training()}, *_everywhere("gptq")(setting)]


def _last_by(objective: Any) -> Callable[[Setting], Plan]:
    def plan(setting: Setting) -> Plan:
        rest = _everywhere("flexround")(setting)
        return [{**rest[0], "match": "last", "objective": objective}, *rest]

    return plan


def _recipe(setting: Setting) -> Plan:
    quantizer = setting.quantizer("adaround", init="awq")
    rest = {"match": "all", "quantizer": quantizer, **setting.training(), "steps": setting.steps * 9 // 16}
    anchored = [{"name": "logit_ce", "weight": 1}, {"name": "mse", "normalised": True, "weight": 5}]
    return [{**rest, "match": "last", "objective": anchored, "steps": setting.steps * 2 // 5}, rest]


RECIPE = "recipe"
METHODS: dict[str, Callable[[Setting], Plan]] = {
    "rtn": _everywhere("rtn"),
    "nf4": lambda _: [{"match": "all", "quantizer": "nf4"}],
    "gptq": _everywhere("gptq"),
    "gptq+lfq": _gptq_lfq,
    "awq": _everywhere("awq"),
    "flexround": _everywhere("flexround"),
    "flexround+lfq": _with_lfq("flexround"),
    "omniquant": _everywhere("omniquant"),
    "omniquant+lfq": _with_lfq("omniquant"),
    "block_ap": _everywhere("block_ap"),
    "block_ap+lfq": _with_lfq("block_ap"),
    "adaround": _everywhere("adaround"),
    "adaround+lfq": _with_lfq("adaround"),
    RECIPE: _recipe,
}

# the last block by other objectives, and blocks by other squared errors; FlexRound each time
ABLATIONS: dict[str, Callable[[Setting], Plan]] = {
    **{f"flexround+{name}": _last_by(name) for name in ("kl", "reverse_kl", "js", "topk_kl", "logit_mse", "hard_ce")},
    "flexround+mse+lfq": _last_by([{"name": "mse", "weight": 1}, {"name": "logit_ce", "weight": 1}]),
    **{f"gptq correct {share}": _everywhere("gptq", correct=share) for share in (0.25, 1.0)},
    "flexround normalised": _everywhere("flexround", objective={"name": "mse", "normalised": True}),
    "flexround massive": _everywhere("flexround", objective={"name": "mse", "massive": 100.0}),
}
