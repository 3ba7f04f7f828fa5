"""Write docs/configuration.md, the reference of every key, from the code: `python docs/configuration.py`."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from lfq_lightning.calibration.calibration_module import CalibrationModule
from lfq_lightning.callbacks import CALLBACKS
from lfq_lightning.callbacks.block_scheduler import BlockScheduler
from lfq_lightning.data import CalibrationData
from lfq_lightning.data.source import Source
from lfq_lightning.grids import GRIDS
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer
from lfq_lightning.registry import Registry
from lfq_lightning.stages import STAGES, Rule
from lfq_lightning.trainer import Trainer

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Configuration

Every key of a run's YAML, made from the code by `python docs/configuration.py`; a test compares. On the command line a
key is `--key.path value`, with dashes for underscores; several `--config` merge, later ones win;
`lfq run --config FILE --print-config` prints the whole. At the end of a line stands the default, or *needed*.
`lightning run` is `lfq run`; every other word after `lightning` goes to lightning-sdk, if that is installed.

Presets are in [configs](../configs): `fast-…`, `balanced-…` and `best-…` lose least in our measurements for the time
they take (`recommended-…` is `balanced-…`); FlexRound, OmniQuant and Block-AP with LFQ are the paper's methods; GPTQ
with LFQ, and AWQ, take minutes.
"""


def page() -> str:
    """Return the text of docs/configuration.md."""
    parts = [
        HEAD,
        "## model\n",
        _keys(CalibrationModule),
        "## data\n",
        _keys(CalibrationData),
        "A source of a mixture, `dataset: [{source: …, weight: …}]`:\n",
        _keys(Source),
        "## plan: a list of rules, first match wins\n",
        _keys(Rule),
        "## trainer\n",
        f"Every argument of Lightning's Trainer. Those with a default of our own:\n\n{_keys(Trainer)}",
        "## The run\n",
        _keys(BlockScheduler, omit=("plan", "resolved_config")),
        "- `seed_everything`: of shuffling, sampling and training. 0\n"
        "- `size`: bytes of all weights, such as `60MB`: each layer gets one of several grids, by what its error does "
        "to the model; the plan is written to `OUTPUT.plan.yaml`. `bits` or `grid` of a quantizer may then be a list. "
        "none\n"
        "- `average_bits`: the same by bits per weight of the quantised layers, scales included. none\n"
        "- `plugins`: Python files with plugins of your own. none\n"
        "- `callbacks`: registered callbacks, each a name or `{name: …, option: …}`. none\n",
        *(_plugins(title, registry) for title, registry in _REGISTRIES.items()),
    ]
    return "\n".join(parts)


_REGISTRIES: dict[str, Registry[Any]] = {
    "Quantizers": QUANTIZERS,
    "Objectives": OBJECTIVES,
    "Stages": STAGES,
    "Callbacks": CALLBACKS,
    "Grids": GRIDS,
}


def _keys(cls: type, omit: tuple[str, ...] = ()) -> str:
    """Return a line for each documented argument of a class: its name, what it is, its default."""
    defaults = _defaults(cls)
    rows = [(name, text) for name, text in _documented(cls).items() if name not in omit]
    return "\n".join(f"- `{name}`: {text} {_shown(defaults[name])}" for name, text in rows) + "\n"


def _documented(cls: type) -> dict[str, str]:
    text = inspect.getdoc(cls) or ""
    block = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block, re.MULTILINE)
    return {name: " ".join(what.split()) for name, what in found}


def _defaults(cls: type) -> dict[str, Any]:
    if dataclasses.is_dataclass(cls):
        return {field.name: field.default for field in dataclasses.fields(cls)}
    return {name: each.default for name, each in inspect.signature(cls.__init__).parameters.items()}


def _shown(default: Any) -> str:
    if default in (inspect.Parameter.empty, dataclasses.MISSING):
        return "*needed*"
    return f"`{str(default).lower() if isinstance(default, bool | None) else default}`"


def _plugins(title: str, registry: Registry[Any]) -> str:
    lines = [f"## {title}\n"]
    for name in registry.names():
        cls = registry.get(name)
        if not cls.__module__.startswith("lfq_lightning."):
            continue
        options = dict(registry.options(name)) | (
            {"init": cls.default_init} if issubclass(cls, LearnedQuantizer) else {}
        )
        listed = ", ".join(f"`{option}: {_bare(value)}`" for option, value in options.items())
        what = (inspect.getdoc(cls) or "").partition("\n")[0]
        lines.append(f"- `{name}`: {what} Source: {vars(cls)['paper']}." + (f" Options: {listed}." if listed else ""))
    if registry is QUANTIZERS:
        lines.append(
            "\nEvery quantizer also takes `bits: 4`, `group_size: -1` (per output channel), `symmetric: true`; or "
            "`grid: NAME` in their place."
        )
    return "\n".join(lines) + "\n"


def _bare(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
