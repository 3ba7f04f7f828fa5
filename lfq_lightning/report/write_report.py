"""Write report.html: one run on a page, or several side by side."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lfq_lightning.clock import clock
from lfq_lightning.evaluation.paired import compare
from lfq_lightning.report.run_record import RunRecord
from lfq_lightning.report.said_grids import said_grids
from lfq_lightning.report.sections import Runs, confidence, cost, depth, flips, size, weights
from lfq_lightning.write_file import write_text

_METRICS = {
    "kl": ("KL to FP", 4),
    "top1_agreement": ("top-1 agreement", 4),
    "flip_rate": ("flip rate", 4),
    "perplexity": ("perplexity", 2),
}
_LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer{imported}

model = AutoModelForCausalLM.from_pretrained("{name}"{extra})   # needs compressed-tensors
tokenizer = AutoTokenizer.from_pretrained("{name}")

lfq generate {name} "Why is the sky blue?"       # or packed in memory, by lfq_lightning
lfq export {name} --format gguf --output {name}.gguf"""

_SECTIONS = (depth, flips, confidence, weights, size, cost)
_ELSEWHERE = {
    "ggml": """lfq export {name} --format gguf --output {name}.gguf   # for llama.cpp
lfq generate {name} "Why is the sky blue?\"""",
    "mlx": """mlx_lm.generate --model {name} --prompt "Why is the sky blue?"
lfq generate {name} "Why is the sky blue?\"""",
}


def write_report(folders: list[str], file: Path) -> Path:
    """Write the page of some finished runs. Raises UserError if one is not.

    The page is one file: no script, nothing fetched, colours by the reader's light or dark setting.
    """
    runs = _distinct([RunRecord.read(folder) for folder in folders])
    environment = Environment(
        loader=PackageLoader("lfq_lightning", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(_content(runs))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page)
    return file


def _distinct(runs: list[RunRecord]) -> Runs:
    """Name each run by its folder; runs of the same name get a number."""
    names: list[str] = []
    for run in runs:
        names.append(run.name if run.name not in names else f"{run.name} ({len(names) + 1})")
    return list(zip(names, runs, strict=True))


def _content(runs: Runs) -> dict[str, Any]:
    name, first = runs[0]
    alone = len(runs) == 1
    return {
        "title": f"{first.model_name}, quantised" if alone else f"{len(runs)} runs side by side",
        "subtitle": _said(first) if alone else ", ".join(f"{name}: {run.model_name}" for name, run in runs),
        "numbers": _numbers(first) if alone else [],
        "lost": _lost(runs),
        "sections": [
            s for s in (depth(runs), flips(runs), confidence(runs), weights(runs), size(runs), cost(runs)) if s
        ],
        "examples": [(n, rows) for n, run in runs if (rows := _examples(run))],
        "evaluations": [item for n, run in runs for item in _evaluations(n if not alone else "", run)],
        "settings": _settings(runs),
        "configs": [(n, run.yaml_text) for n, run in runs if run.yaml_text],
        "loading": _loading(name, first) if alone else "",
    }


def _said(run: RunRecord) -> str:
    kinds = said_grids(run.config.get("quantization_config", {}))
    if reference := run.metrics.get("reference"):
        kinds.append(f"full precision: {reference}")
    return "; ".join(sorted(set(kinds))) or "nothing was quantised"


def _numbers(run: RunRecord) -> list[tuple[str, str]]:
    lost, before = run.held_out("quantized"), run.held_out("full_precision")
    return [
        (f"{lost['kl']:.3f}", "KL to full precision, nats per token"),
        (f"{lost['top1_agreement']:.1%}", "same top-1 token"),
        (f"{lost['perplexity']:.2f}", f"perplexity; {before['perplexity']:.2f} in full precision"),
        (f"{run.metrics['model_bytes'] / 1e6:,.0f} MB", "of weights"),
        (clock(run.metrics["seconds"]), "to make it"),
        (f"{run.metrics['peak_bytes'] / 2**30:.2f} GiB", "memory at most"),
    ]


def _lost(runs: Runs) -> dict[str, Any]:
    head = ["on held-out tokens", *(title for title, _ in _METRICS.values())]
    rows = [["full precision", *_cells(runs[0][1].held_out("full_precision"))]]
    notes = []
    for name, run in runs:
        lead = f"{name}: " if len(runs) > 1 else ""
        rows.append([f"{lead}before the last training", *_cells(run.held_out("before_last_training"))])
        rows.append([f"{lead}quantised", *_cells(run.held_out("quantized"))])
        if len(runs) == 1:
            sides = [run.metrics[which]["per_sequence"]["kl"] for which in ("quantized", "before_last_training")]
            notes.append(f"The last training changed the KL {_paired(*sides)}.")
    base = runs[0][1].metrics["quantized"]["per_sequence"]["kl"]
    for name, run in runs[1:]:
        own = run.metrics["quantized"]["per_sequence"]["kl"]
        comparable = len(own) == len(base) and run.held_out("full_precision") == runs[0][1].held_out("full_precision")
        told = f"{name} against {runs[0][0]}: KL {_paired(own, base)}."
        notes.append(told if comparable else f"{name} was measured on other tokens than {runs[0][0]}.")
    return {"head": head, "rows": rows, "note": " ".join(notes)}


def _paired(a: list[float], b: list[float]) -> str:
    found = compare(a, b)
    return (
        f"by {found.difference:+.4f} (95 % interval {found.low:+.4f} … {found.high:+.4f}, p = {found.p:.2g}, "
        f"paired over {found.count} sequences)"
    )


def _cells(values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.{digits}f}" for name, (_, digits) in _METRICS.items()]


def _examples(run: RunRecord) -> list[dict[str, str]]:
    rows = []
    for example in run.metrics.get("profile", {}).get("examples", []):
        words = {which: run.tokenizer.decode([token]) for which, token in example["top"].items()}
        chances = example["probability"]
        rows.append(
            {
                "context": str(run.tokenizer.decode(example["context"])).replace("\n", " ⏎ "),
                "teacher": f"“{words['full_precision']}”",
                "student": f"“{words['quantized']}”",
                "teacher_p": _chances(chances, "full_precision"),
                "student_p": _chances(chances, "quantized"),
            }
        )
    return rows


def _chances(chances: dict[str, dict[str, float]], word: str) -> str:
    return f"{chances['full_precision'][word]:.0%} → {chances['quantized'][word]:.0%}"


def _evaluations(name: str, run: RunRecord) -> list[tuple[str, dict[str, Any]]]:
    if run.evaluation is None:
        return []
    found = []
    for part, metrics in run.evaluation["parts"].items():
        models = list(next(iter(metrics.values())))
        head = ["", *models[:1], *(c for model in models[1:] for c in (Path(model).name, "difference, p"))]
        rows = []
        for metric, by_model in metrics.items():
            cells = [metric]
            for model, row in by_model.items():
                shown = "no number" if row["value"] is None else f"{row['value']:.4g}"
                cells.append(shown + (f" ± {row['stderr']:.2g}" if row["stderr"] is not None else ""))
                if model != models[0]:
                    test = row.get("against_full_precision")
                    known = test is not None and test["p"] is not None
                    cells.append(f"{test['difference']:+.3g} {row['unit']}, {test['p']:.2g}" if known else "")
            rows.append(cells)
        title = f"{name}: {part}" if name else part
        found.append((title, {"head": head, "rows": rows, "note": ""}))
    return found


def _settings(runs: Runs) -> dict[str, Any]:
    rows = [["model", *(run.model for _, run in runs)], ["quantised as", *(_said(run) for _, run in runs)]]
    rules = max(len(run.settings.get("plan", [])) for _, run in runs)
    for number in range(rules):
        rows.append([f"rule {number + 1}", *(_rule(run.settings.get("plan", []), number) for _, run in runs)])
    for title, section, key in (
        ("data", "data", "dataset"),
        ("sequences", "data", "num_samples"),
        ("tokens each", "data", "seq_len"),
        ("held out", "data", "num_held_out"),
        ("precision", "trainer", "precision"),
    ):
        rows.append([title, *(str(run.settings.get(section, {}).get(key, "")) for _, run in runs)])
    rows.append(["seed", *(str(run.settings.get("seed_everything", "")) for _, run in runs)])
    for package in sorted({package for _, run in runs for package in run.versions}):
        rows.append([package, *(run.versions.get(package, "") for _, run in runs)])
    return {"head": ["", *(name for name, _ in runs)], "rows": rows, "note": ""}


def _rule(plan: list[dict[str, Any]], number: int) -> str:
    if number >= len(plan):
        return ""
    rule = plan[number]
    quantizer, objective = rule["quantizer"], rule.get("objective") or "mse"
    named = quantizer if isinstance(quantizer, str) else ", ".join(f"{k} {v}" for k, v in quantizer.items())
    if isinstance(objective, list):
        objective = " + ".join(f"{term['weight']} {term['name']}" for term in objective)
    elif isinstance(objective, dict):
        objective = objective["name"]
    return f"{rule['match']}: {named.removeprefix('name ')}; {objective}, {rule['steps']} steps"


def _loading(name: str, run: RunRecord) -> str:
    quantization = run.config.get("quantization_config", {})
    if quantization.get("quant_method") in _ELSEWHERE:
        return _ELSEWHERE[quantization["quant_method"]].format(name=name)
    groups = quantization.get("config_groups", {}).values()
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    imported = "" if symmetric else ", CompressedTensorsConfig"
    extra = "" if symmetric else ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    return _LOADING.format(name=name, imported=imported, extra=extra)
