"""The paper's tables: check that everything for them is there, run a cell, write docs/reproduce.md.

python -m benchmarks.paper dry-run                                    all models, methods and tasks; no weights
python -m benchmarks.paper run --model qwen2.5-7b-instruct --method flexround-lfq-w4 --work runs/paper
python -m benchmarks.paper table
"""

import argparse
import csv
import importlib.util
import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lfq_lightning.cli import main
from lfq_lightning.commands.eval import eval_parser
from lfq_lightning.errors import UserError
from lfq_lightning.evaluation.evaluate_models import REFERENCE
from lfq_lightning.planning.plan_run import RunPlan, parse_machine, plan_config
from lfq_lightning.run import read_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "paper"
RESULTS = ROOT / "benchmarks" / "results" / "paper.csv"
DOCUMENT = ROOT / "docs" / "reproduce.md"
BEGIN, END = "<!-- paper: begin -->", "<!-- paper: end -->"
COLUMNS = (
    "model",
    "method",
    "benchmark",
    "value",
    "stderr",
    "p against full precision",
    "gpu",
    "lfq-lightning",
    "torch",
)
CARD = "80GB"

Published = list[dict[str, Any]]


def names(kind: str) -> list[str]:
    """Return the models or methods there are files for."""
    return sorted(file.stem.removeprefix(f"{kind}-") for file in CONFIGS.glob(f"{kind}-*.yaml"))


def published() -> Published:
    """Return published.yaml."""
    return yaml.safe_load((CONFIGS / "published.yaml").read_text(encoding="utf-8"))


def configs(model: str, method: str) -> list[str]:
    """Return the arguments that name a run's two files."""
    return ["--config", str(CONFIGS / f"model-{model}.yaml"), "--config", str(CONFIGS / f"method-{method}.yaml")]


def plan_of(model: str, method: str) -> RunPlan:
    """Return what a run takes on one card, by its config and the model's shape alone."""
    config = read_config(["run", *configs(model, method), "--output", "planned"])
    return plan_config(config, parse_machine(CARD, 1, None, config.trainer.precision))


def dry_run() -> None:
    """Check shapes, plans, memory, names of tasks and methods; print a line for each run. Raises SystemExit."""
    known, card = names("method"), int(float(CARD.removesuffix("GB")) * 1e9)
    tasks: set[str] = set()
    for entry in published():
        if entry["model"] not in names("model"):
            raise SystemExit(f"published.yaml: there is no model-{entry['model']}.yaml")
        for benchmark in entry["benchmarks"]:
            given = eval_parser().parse_args(["DIR", *shlex.split(benchmark["arguments"])])
            tasks.update(given.tasks)
            unknown = set(benchmark["published"]) - {REFERENCE, *known}
            if unknown:
                raise SystemExit(f"published.yaml: there is no method-{min(unknown)}.yaml")
    if importlib.util.find_spec("lm_eval") is not None:
        from lfq_lightning.evaluation.task_list import TaskList

        TaskList(sorted(tasks), None)
        told = f"tasks known to lm-eval {version('lm-eval')}: {', '.join(sorted(tasks))}"
    else:
        told = "lm-eval is not installed, so names of tasks were not checked (pip install '.[eval]')"
    table = Table(title=f"one {CARD} card", title_justify="left")
    for column in ("model", "method", "most on the card", "host", "disk", "hours at 300 TFLOP/s"):
        table.add_column(column, justify="left" if column in {"model", "method"} else "right")
    for model in names("model"):
        for method in known:
            plan = plan_of(model, method)
            if plan.device_peak > card:
                raise SystemExit(f"{model} by {method} needs {plan.device_peak / 1e9:.1f} GB, more than {CARD}")
            host = (plan.outer + plan.streams) / 1e9
            cells = f"{plan.device_peak / 1e9:.1f} GB", f"{host:.1f} GB", f"{plan.output / 1e9:.1f} GB"
            table.add_row(model, method, *cells, f"{plan.seconds / 3600:.2f}")
    Console(width=130).print(table)
    print(f"{table.row_count} runs fit; {told}")


def run(model: str, method: str, work: Path) -> None:
    """Quantise (if `work` has not that run yet) and measure it; rows go to paper.csv as they come."""
    import torch

    output = work / f"{model}-{method}"
    if not (output / "config.json").exists():
        main(["run", *configs(model, method), "--output", str(output)])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    entry = next((entry for entry in published() if entry["model"] == model), None)
    if entry is None:
        raise SystemExit(f"published.yaml has no benchmarks for {model}; known: {', '.join(names('model'))}")
    for benchmark in entry["benchmarks"]:
        main(["eval", str(output), *shlex.split(benchmark["arguments"])])
        measured = json.loads((output / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
        for name, found in measured["parts"][benchmark["part"]][benchmark["metric"]].items():
            scale, test = benchmark["scale"], found.get("against_full_precision", {})
            stderr = "" if found["stderr"] is None else f"{scale * found['stderr']:.3f}"
            versions = [version(package) for package in ("lfq-lightning", "torch")]
            shown = (f"{scale * found['value']:.4g}", stderr, test.get("p", ""), gpu, *versions)
            _keep(
                dict(
                    zip(
                        COLUMNS,
                        (model, REFERENCE if name == REFERENCE else method, benchmark["name"], *shown),
                        strict=True,
                    )
                )
            )
    write_table()


def _rows() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def _keep(row: dict[str, Any]) -> None:
    """Add a row, in place of an earlier one of the same cell."""
    kept = [old for old in _rows() if any(old[key] != row[key] for key in COLUMNS[:3])]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, row])


def write_table() -> None:
    """Put the tables into docs/reproduce.md: what was published, and what a run here has measured."""
    measured = {(row["model"], row["method"], row["benchmark"]): row for row in _rows()}
    parts = []
    for entry in published():
        lines = ["| benchmark | method | published | measured here |", "|---|---|---|---|"]
        for benchmark in entry["benchmarks"]:
            for method, value in benchmark["published"].items():
                row = measured.get((entry["model"], method, benchmark["name"]))
                ours = f"{row['value']} ± {row['stderr']} ({row['gpu']})" if row else ""
                lines.append(f"| {benchmark['name']} | {method} | {value} | {ours} |")
        commands = "\n".join(f"lfq eval RUN {benchmark['arguments']}" for benchmark in entry["benchmarks"])
        parts.append(f"### {entry['model']}\n\n```bash\n{commands}\n```\n\n" + "\n".join(lines))
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}{after}", encoding="utf-8")


def _command() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper")
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("dry-run")
    what.add_parser("table")
    one = what.add_parser("run")
    one.add_argument("--model", choices=names("model"), required=True)
    one.add_argument("--method", choices=names("method"), required=True)
    one.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    if given.what == "dry-run":
        dry_run()
    elif given.what == "table":
        write_table()
    else:
        run(given.model, given.method, given.work)


if __name__ == "__main__":
    try:
        _command()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
