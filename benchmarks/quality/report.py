"""Write the tables of the comparison, from benchmarks/results/quality.csv into docs/results.md and the README.

python -m benchmarks.quality.report
"""

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.quality.__main__ import PEERS, RESULTS
from benchmarks.quality.methods import ABLATIONS, METHODS, RECIPE
from lfq_lightning.evaluation.paired import compare

ROOT = Path(__file__).parents[2]
_FOLD = {  # rows of the README's table
    "SmolLM2-135M, 3 bits": "smollm2-135m, W3g64",
    "stories15M, 4 bits": "stories15m, W4g96",
    "stories15M, 3 bits": "stories15m, W3g96",
    "stories15M, 2 bits": "stories15m, W2g32",
}
LFQ = ("+lfq", "+lfq anchored")  # suffixes of a method whose last block is by LFQ
COLUMNS = {
    "kl": ("KL to FP", "#.3g"),
    "top1_agreement": ("top-1", ".3f"),
    "flip_rate": ("flips", ".3f"),
    "perplexity": ("perplexity", ".2f"),
    "kl_other": ("KL, other domain", "#.3g"),
    "tokens_before_difference": ("tokens before difference", ".1f"),
    "seconds": ("seconds", ".0f"),
    "peak_rss_gb": ("peak RSS, GB", ".2f"),
}

Rows = list[dict[str, str]]


def main() -> None:
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tables = [f"## {title}\n\n{_table(group)}" for title, group in _groups(rows).items()]
    won, lfq = _lfq_table(rows)
    count = f"The last block by LFQ in place of MSE, KL lower at p < .01: {won}."
    lead = f"## LFQ on against off\n\n{count}\n\n{lfq}"
    put_between_marks(ROOT / "docs" / "results.md", "quality", "\n\n".join([_summary(rows), lead, *tables]))
    put_between_marks(ROOT / "README.md", "quality", _above_the_fold(rows))


def _groups(rows: Rows) -> dict[str, Rows]:
    groups: dict[str, Rows] = defaultdict(list)
    for row in rows:
        groups[f"{row['model']}, {row['setting'].replace('w', 'W')}, {row['steps']} steps"].append(row)
    return dict(sorted(groups.items()))


def mean(rows: Rows, column: str) -> float:
    """Return the mean of a column over the rows that have it (a row run beside other work has no seconds); or NaN."""
    values = [float(row[column]) for row in rows if row[column]]
    return statistics.mean(values) if values else float("nan")


def _shown(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _by_method(rows: Rows) -> dict[str, Rows]:
    order = [*METHODS, *PEERS, *ABLATIONS]
    methods = sorted({row["method"] for row in rows}, key=order.index)
    return {method: [row for row in rows if row["method"] == method] for method in methods}


def _table(rows: Rows) -> str:
    lines = [
        f"| method | seeds | {' | '.join(title for title, _ in COLUMNS.values())} |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for method, own in _by_method(rows).items():
        numbers = (_shown(mean(own, column), form) for column, (_, form) in COLUMNS.items())
        lines.append(f"| {method} | {len(own)} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _summary(rows: Rows) -> str:
    """KL of each method (mean over seeds), a column per model and setting, and the recipe against AutoRound."""
    groups = _groups(rows)
    methods = list(_by_method(rows))
    heads = [title.replace(", ", "<br>") for title in groups]
    lines = [f"| KL to FP | {' | '.join(heads)} |", "|---" * (1 + len(groups)) + "|"]
    for method in methods:
        cells = []
        for group in groups.values():
            own = [row for row in group if row["method"] == method]
            cells.append(_shown(mean(own, "kl"), COLUMNS["kl"][1]))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    ratios = []
    for group in groups.values():
        pair = [[row for row in group if row["method"] == method] for method in (RECIPE, "autoround")]
        seeds = {row["seed"] for row in pair[0]} & {row["seed"] for row in pair[1]}
        ours, theirs = ([row for row in side if row["seed"] in seeds] for side in pair)
        if seeds:
            change = mean(ours, "kl") / mean(theirs, "kl") - 1
            time = mean(ours, "seconds") / mean(theirs, "seconds")
            ratios.append(f"{change:+.0%}" + ("" if math.isnan(time) else f", {time:.2f}x the time"))
        else:
            ratios.append("")
    lines.append(f"| **{RECIPE} against autoround, same seeds** | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _above_the_fold(rows: Rows) -> str:
    """The KL of a few methods in a few settings, and the recipe against AutoRound: the README's table."""
    methods = ("gptq", "awq", "autoround", RECIPE)
    lines = ["| | GPTQ | AWQ | AutoRound | recommended | against AutoRound |", "|---" * (2 + len(methods)) + "|"]
    for title, setting in _FOLD.items():
        group = next(group for name, group in _groups(rows).items() if name.startswith(setting))
        means = {method: mean([row for row in group if row["method"] == method], "kl") for method in methods}
        cells = [_shown(mean, COLUMNS["kl"][1]) for mean in means.values()]
        cells[-1] = f"**{cells[-1]}**"
        pair = [[row for row in group if row["method"] == method] for method in (RECIPE, "autoround")]
        seeds = {row["seed"] for row in pair[0]} & {row["seed"] for row in pair[1]}
        ours, theirs = (mean([row for row in side if row["seed"] in seeds], "kl") for side in pair)
        lines.append(f"| {title} | {' | '.join(cells)} | {ours / theirs - 1:+.0%} |")
    return "\n".join(lines)


def _lfq_table(rows: Rows) -> tuple[str, str]:
    """Pair each method with itself + LFQ over held-out sequences; return a count of the differences and the table."""
    heads = [f"KL with {suffix.removeprefix('+')} | difference | p" for suffix in LFQ]
    lines = [f"| model, setting | method | KL without | {' | '.join(heads)} |", "|---" * (3 + 3 * len(LFQ)) + "|"]
    won, cells = dict.fromkeys(LFQ, 0), dict.fromkeys(LFQ, 0)
    for title, group in _groups(rows).items():
        methods = _by_method(group)
        for method, own in methods.items():
            pairs = {suffix: _paired(own, methods.get(method + suffix, [])) for suffix in LFQ}
            there = [off for off, _ in pairs.values() if off]
            if not there:
                continue
            columns = []
            for suffix, (off, on) in pairs.items():
                if not on:
                    columns.append(" |  | ")
                    continue
                found = compare(on, off)
                won[suffix] += found.difference < 0 and found.p < 0.01
                cells[suffix] += 1
                p = "< .0001" if found.p < 1e-4 else f"{found.p:.4f}"
                columns.append(f"{statistics.mean(on):#.4g} | {found.difference:+#.2g} | {p}")
            lines.append(f"| {title} | {method} | {statistics.mean(there[0]):#.4g} | {' | '.join(columns)} |")
    count = "; ".join(f"`{suffix}`: {won[suffix]} of {cells[suffix]} cells" for suffix in LFQ if cells[suffix])
    return count, "\n".join(lines)


def _paired(off: Rows, on: Rows) -> tuple[list[float], list[float]]:
    """Return the KL of each held-out sequence, its mean over the seeds that both sides have: seeds share sequences."""
    sides = [{row["seed"]: [float(v) for v in row["kl_per_sequence"].split()] for row in side} for side in (off, on)]
    seeds = sides[0].keys() & sides[1].keys()
    one, other = ([statistics.mean(v) for v in zip(*(side[s] for s in seeds), strict=True)] for side in sides)
    return one, other


def put_between_marks(file: Path, name: str, content: str) -> None:
    """Replace what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    file.write_text(f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
