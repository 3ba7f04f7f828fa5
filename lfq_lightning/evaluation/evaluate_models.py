"""`lfq eval`: measure models against full precision, and each against the first; as a table and as JSON."""

import json
import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.evaluation.evaluated_model import EvaluatedModel
from lfq_lightning.evaluation.paired import compare
from lfq_lightning.evaluation.score import Measure, Score
from lfq_lightning.file_names import RESOLVED
from lfq_lightning.ops.path import best_device
from lfq_lightning.write_file import write_text

RESULTS = "evaluation.json"
REFERENCE = "full precision"
_WIDTH = 140  # of a log file


def reference_of(folder: str) -> str:
    """Return the model that a run's folder was made from. Raises UserError if it does not say."""
    try:
        settings = yaml.safe_load((Path(folder).expanduser() / RESOLVED).read_text(encoding="utf-8"))
        return str(settings["model"]["checkpoint"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not say which model it was made from; give --reference.") from error


def evaluate_models(
    sources: list[str], reference: str, measures: list[Measure], output: Path, packed: bool
) -> dict[str, Any]:
    """Measure models and return what was found; `output`/evaluation.json also keeps earlier parts of the same models.

    The full-precision model runs first, then each other, one in memory at a time. Answers are kept as they come: the
    same command resumes where it was stopped, and what one call has measured the next does not measure again.

    Args:
        sources: the models; the first is what the others are compared with.
        reference: the full-precision model.
        measures: what to measure.
        output: folder for answers and results.
        packed: keep layers packed in memory.

    Raises UserError for what is not there or does not fit together, before a model is run.
    """
    device, earlier = best_device(), _earlier(output / RESULTS)
    teacher = EvaluatedModel(reference, device, output)
    others = {source: EvaluatedModel(source, device, output, packed) for source in sources}
    for source, model in others.items():
        if model.vocab_size != teacher.vocab_size:
            raise UserError(
                f"{source} has a vocabulary of {model.vocab_size}, {reference} one of "
                f"{teacher.vocab_size}, so neither was made from the other; give the right --reference."
            )
    for measure in measures:
        measure.begin(teacher, list(others.values()))
    parts: dict[str, dict[str, dict[str, Score]]] = defaultdict(lambda: defaultdict(dict))
    for name, model in [(REFERENCE, teacher), *others.items()]:
        for measure in measures:
            for part, scores in measure.scores(model).items():
                for metric, score in scores.items():
                    parts[part][metric][name] = score
        model.release()
    compared = {part: {name: _compared(by) for name, by in metrics.items()} for part, metrics in parts.items()}
    results = {"models": sources, "reference": reference, "parts": compared}
    output.mkdir(parents=True, exist_ok=True)
    same = all(earlier.get(key) == results[key] for key in ("models", "reference"))
    kept = {**results, "parts": {**(earlier["parts"] if same else {}), **compared}}
    write_text(output / RESULTS, json.dumps(kept, indent=2) + "\n")
    return results


def _earlier(file: Path) -> dict[str, Any]:
    """Return what an earlier call has measured, of the same models or of others."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON any more ({one_line(error)}); remove it.") from error


def _compared(by_model: dict[str, Score]) -> dict[str, Any]:
    """Return each model's score, with its difference from full precision and from the first model."""
    first = next(name for name in by_model if name != REFERENCE)
    rows: dict[str, Any] = {}
    for name, score in by_model.items():
        rows[name] = {
            "value": _number(score.value),
            "stderr": _number(score.stderr),
            "examples": len(score.per_example),
            "higher_is_better": score.higher_is_better,
            "unit": score.unit,
            "per_example": [_number(value) for value in score.per_example],
        }
        for key, other in (("against_full_precision", REFERENCE), ("against_first", first)):
            paired = by_model[other].per_example
            if name not in {REFERENCE, other} and score.per_example and paired:
                found = asdict(compare(score.per_example, paired))
                rows[name][key] = {k: _number(v) if isinstance(v, float) else v for k, v in found.items()}
    return rows


def _number(value: float) -> float | None:
    """Return a number as JSON can hold it: None for what is none."""
    return value if math.isfinite(value) else None


def print_results(results: dict[str, Any]) -> None:
    """Print a table for each part: a row per metric, a column per model, and the p of what may be chance."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        console.width = _WIDTH
    letters = dict(zip(results["models"], ascii_uppercase, strict=False))
    for source, letter in letters.items():
        console.print(f"{letter}: {source}")
    for part, metrics in results["parts"].items():
        table = Table(title=part, title_justify="left")
        table.add_column("± standard error")
        table.add_column("full precision", justify="right")
        for letter in letters.values():
            table.add_column(letter, justify="right")
            table.add_column(f"p of {letter} - FP", justify="right")
            if letter != "A":
                table.add_column(f"p of {letter} - A", justify="right")
        for metric, rows in metrics.items():
            cells = [_value(rows[REFERENCE])]
            for source in letters:
                tests = ["against_full_precision", *(["against_first"] if source != results["models"][0] else [])]
                cells += [_value(rows[source]), *(_p(rows[source].get(test)) for test in tests)]
            table.add_row(metric, *cells)
        console.print(table)


def _p(test: dict[str, Any] | None) -> str:
    return "" if test is None or test["p"] is None else f"{test['p']:.4f}"


def _value(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "no number"
    return f"{row['value']:.4g}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.2g}")
