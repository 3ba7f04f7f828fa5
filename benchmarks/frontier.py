"""KL against CPU seconds: the recommended recipe at several budgets, GPTQ, and AutoRound at several numbers of steps.

    python -m benchmarks.frontier --model stories15m=STORIES15M --settings w4 w3g96 w2g32 \\
        --calibration tinystories.txt --other wikitext2-valid.txt --work runs/frontier --peer-python PEER/bin/python
    python -m benchmarks.frontier --report

One row of a CSV each; a row that is there is not made again, so it may stop and go on at any time. Seconds are those of
the processor, of the whole process that quantises (start, reading and writing included), so that work beside it does
not count; a row of another kind of CPU is another row. All methods see the same tokens, as in `benchmarks.quality`;
with `--source self` our runs calibrate on text that the model writes. `--report` writes charts and tables into docs.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import cpu, cpu_seconds
from benchmarks.quality.__main__ import (
    SELECTION_AT_THE_END,
    dense_folder,
    run_command,
    split_text,
    versions_beside,
    write_tokens,
)
from benchmarks.quality.measure import Reference, quantised, reference_on
from benchmarks.quality.methods import METHODS, Plan, Setting
from benchmarks.quality.report import ROOT, Rows, mean, put_between_marks
from benchmarks.rows import append, finished
from lfq_lightning.report.chart import HEIGHT, WIDTH, Line, line_chart

RESULTS = ROOT / "benchmarks" / "results" / "frontier.csv"
STEPS, LAST, BATCH = 120, 85, 8  # of the recipe at budget 1: steps a block, steps on the last, sequences a step
BUDGETS = {f"recipe x{share:g}": share for share in (0.5, 1, 2, 4, 8)}
PEERS = {f"autoround {steps}": steps for steps in (50, 200, 1000)}
BESIDE = "autoround 200"  # its default
CLOSED = ("gptq", "gptq+lfq", "fast")
SEQUENCES, SEQ_LEN = 136, 256
ACROSS, CELL = 3, (WIDTH + 20, HEIGHT + 40)  # charts in a row, and the place of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write the chart and the table, and run nothing")
    parser.add_argument("--model", help="NAME=CHECKPOINT")
    parser.add_argument("--calibration", type=Path, help="a .txt; its last part is held out")
    parser.add_argument("--held-out-share", type=float, default=0.1, help="how much of it (0.1)")
    parser.add_argument("--other", type=Path, help="a .txt of another domain")
    parser.add_argument("--settings", nargs="+", help="such as w4 w3g96 w2g32; asymmetric")
    parser.add_argument("--methods", nargs="*", default=[*CLOSED, *BUDGETS, *PEERS])
    parser.add_argument("--own", action="append", default=[], metavar="NAME=FILE", help="keys of a run's config (JSON)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of calibration, those to check by included")
    parser.add_argument("--source", choices=["text", "self"], default="text")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="a folder for what lies between")
    parser.add_argument("--peer-python", help="interpreter of the peer's environment")
    given = parser.parse_args()
    if given.report:
        report()
        return
    needed = ("model", "calibration", "other", "settings", "work")
    if missing := [f"--{name}" for name in needed if getattr(given, name) is None]:
        parser.error(f"{', '.join(missing)} must be given, or --report.")
    given.work.mkdir(parents=True, exist_ok=True)
    frontier = Frontier(given)
    own = dict(pair.split("=", 1) for pair in given.own)
    for seed in given.seeds:
        for setting in given.settings:
            for method in [*given.methods, *own]:
                if method not in PEERS or (given.peer_python and given.source == "text"):
                    frontier.fill(setting, method, own.get(method), seed)


def plan_of(method: str, bits: int, group_size: int) -> Plan:
    """Return the rules of one of our methods."""
    share = BUDGETS.get(method, 1)
    recipe = (round(STEPS * share), round(LAST * share), BATCH)
    return METHODS[method.partition(" ")[0]](Setting(bits, group_size, False, LAST, BATCH, recipe))


class Frontier:
    """The rows of one model."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.name, _, self.checkpoint = given.model.partition("=")
        self.calibration, self.held_out = split_text(given.calibration, given.held_out_share, given.work)

    @cached_property
    def reference(self) -> Reference:
        return reference_on(self.checkpoint, self.held_out, self.given.other, SEQ_LEN, texts=False)

    def fill(self, label: str, method: str, own: str | None, seed: int) -> None:
        """Make one row, unless it is there."""
        given = self.given
        cell = {"model": self.name, "setting": label, "method": method, "seed": str(seed)}
        cell |= {"sequences": str(given.sequences), "source": given.source}
        folder = given.work / "-".join(cell.values()).replace(" ", "-")
        if finished(cell | {"cpu": cpu()}, given.results):
            return
        bits, _, group = label.removeprefix("w").partition("g")
        command, python = self._command(method, own, int(bits), int(group) if group else -1, folder, seed)
        packages = ("torch", "transformers", "auto-round" if method in PEERS else "lfq-lightning")
        started = cpu_seconds()
        with folder.with_suffix(".log").open("w") as log:
            if subprocess.run(command, stdout=log, stderr=log).returncode != 0:
                raise SystemExit(f"{' '.join(command)} failed; see {log.name}.")
        seconds = cpu_seconds() - started
        measured = self.reference.measure(quantised(folder))
        per_sequence = " ".join(f"{value:.6g}" for value in measured.pop("kl_per_sequence"))
        row = cell | {"cpu_seconds": f"{seconds:.1f}"} | {name: f"{value:.6g}" for name, value in measured.items()}
        row |= {"threads": str(torch.get_num_threads()), "cpu": cpu(), "versions": versions_beside(python, packages)}
        append(given.results, row | {"kl_per_sequence": per_sequence})
        print(*cell.values(), *(row[key] for key in ("kl", "kl_other", "cpu_seconds")), flush=True)

    def _command(
        self, method: str, own: str | None, bits: int, group: int, folder: Path, seed: int
    ) -> tuple[list[str], str]:
        """Return the command of a run, and its Python."""
        given = self.given
        data = {"dataset": str(self.calibration), "seq_len": SEQ_LEN, "seed": seed}
        data |= {"num_samples": given.sequences - SELECTION_AT_THE_END, "num_held_out": SELECTION_AT_THE_END}
        if method in PEERS:
            script = Path(__file__).parent / "quality" / "peer_auto_round.py"
            tokens = write_tokens(self.checkpoint, data, folder)
            words = [given.peer_python, script, dense_folder(self.checkpoint, given.work), tokens, folder]
            words += ["--bits", bits, "--group-size", group, "--steps", PEERS[method], "--batch-size", BATCH]
            return [str(word) for word in [*words, "--seed", seed]], given.peer_python
        if given.source == "self":
            data["dataset"] = "self_generated"
        config: dict[str, Any] = {"seed_everything": seed, "model": {"checkpoint": self.checkpoint}, "data": data}
        config["trainer"] = {"val_check_interval": 1.0}
        config |= json.loads(Path(own).read_text()) if own else {"plan": plan_of(method, bits, group)}
        return run_command(config, folder), sys.executable


def report() -> None:
    """Write docs/frontier-N.svg, one for each kind of CPU, and the tables of docs/results.md."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_cpu: dict[str, Rows] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["cpu"], row["model"], row["setting"])):
        by_cpu[row["cpu"]].append(row)
    parts = []
    for number, (name, own) in enumerate(by_cpu.items(), start=1):
        parts.append(f"### {name}\n\n![KL against CPU seconds](frontier-{number}.svg)\n\n{_tables(own, number)}")
    put_between_marks(ROOT / "docs" / "results.md", "frontier", "\n" + "\n\n".join(parts) + "\n")


def _tables(rows: Rows, number: int) -> str:
    """Write the chart of one kind of CPU; return its tables."""
    usual = [row for row in rows if (row["sequences"], row["source"]) == (str(SEQUENCES), "text")]
    panels: dict[str, Rows] = defaultdict(list)
    for row in usual:
        panels[f"{row['model']}, {row['setting'].replace('w', 'W')}"].append(row)
    (ROOT / "docs" / f"frontier-{number}.svg").write_text(_picture(panels), encoding="utf-8")
    parts = [_table(usual, ("model", "setting", "method"))]
    if any(row["method"] == BESIDE for row in usual):
        parts.append(f"As shares of {BESIDE}, KL *in* CPU seconds, on the seeds that both have:\n\n" + _shares(usual))
    of_text = {(row["model"], row["setting"], row["method"]) for row in rows if row not in usual}
    compared = [row for row in rows if (row["model"], row["setting"], row["method"]) in of_text]
    if compared:
        parts.append(
            "Other amounts of text, or the model's own:\n\n"
            + _table(compared, ("model", "setting", "method", "sequences", "source"))
        )
    return "\n\n".join(parts)


def _picture(panels: dict[str, Rows]) -> str:
    """Return an SVG with a chart for each model and setting."""
    families = _families([row for rows in panels.values() for row in rows])
    ticks = [(math.log2(seconds), str(seconds)) for seconds in (5 * 2**k for k in range(12))]
    charts = []
    for number, (title, rows) in enumerate(panels.items()):
        lines = [Line(name, _points(rows, name), colour) for colour, name in enumerate(families)]
        chart = line_chart(lines, "CPU seconds", "KL to full precision", log_y=True, x_ticks=ticks)
        drawing = chart[: chart.index("</svg>") + len("</svg>")]
        heading = f'<text class="title" x="{WIDTH / 2}" y="-6" text-anchor="middle">{escape(title)}</text>'
        place = f'x="{number % ACROSS * CELL[0]}" y="{number // ACROSS * CELL[1] + 24}"'
        charts.append(f'<svg {place} width="{WIDTH}" height="{HEIGHT}" overflow="visible">{heading}{drawing}</svg>')
    width, height = ACROSS * CELL[0], math.ceil(len(panels) / ACROSS) * CELL[1] + 30
    legend = "".join(
        f'<circle cx="{20 + 170 * k}" cy="{height - 14}" r="5" style="fill:var(--s{k})"/>'
        f'<text x="{30 + 170 * k}" y="{height - 10}">{escape(name)}</text>'
        for k, name in enumerate(families)
    )
    size = f'viewBox="0 0 {width} {height}"'
    style = (ROOT / "lfq_lightning" / "report" / "page.html.jinja").read_text(encoding="utf-8")
    style = style[style.index("<style>") : style.index("</style>") + len("</style>")]
    background = f'<rect width="{width}" height="{height}" style="fill:var(--paper)"/>'
    head = f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" {size}>{style}{background}'
    return head + "".join(charts) + legend + "</svg>\n"


def _families(rows: Rows) -> list[str]:
    """Return the methods without their budgets, ours first."""
    names = {row["method"].partition(" ")[0] for row in rows}
    return sorted(names, key=lambda name: (name in {peer.partition(" ")[0] for peer in PEERS}, name))


def _points(rows: Rows, family: str) -> list[tuple[float, float]]:
    """Return (log2 seconds, KL) of a family's budgets, means over seeds, in the order of time."""
    by_method: dict[str, Rows] = defaultdict(list)
    for row in rows:
        if row["method"].partition(" ")[0] == family:
            by_method[row["method"]].append(row)
    return sorted((math.log2(mean(own, "cpu_seconds")), mean(own, "kl")) for own in by_method.values())


def _table(rows: Rows, groups: Sequence[str]) -> str:
    """Return a table of means over seeds, a row for each value of the columns `groups`."""
    cells: dict[tuple[str, ...], Rows] = defaultdict(list)
    for row in rows:
        cells[tuple(row[name] for name in groups)].append(row)
    columns = {
        "kl": ("KL to FP", "#.3g"),
        "kl_other": ("KL, other domain", "#.3g"),
        "top1_agreement": ("top-1", ".3f"),
        "cpu_seconds": ("CPU seconds", ".0f"),
    }
    titles = [*groups, "seeds", *(title for title, _ in columns.values())]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for names, own in sorted(cells.items()):
        numbers = (f"{mean(own, column):{form}}" for column, (_, form) in columns.items())
        lines.append(f"| {' | '.join([*names, str(len(own)), *numbers])} |")
    return "\n".join(lines)


def _shares(rows: Rows) -> str:
    """Return a table of each method's KL and seconds, in each setting, as shares of the peer's."""
    places = sorted({(row["model"], row["setting"]) for row in rows})
    by: dict[tuple[str, str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        by[row["model"], row["setting"], row["method"]][row["seed"]] = row
    lines = [f"| method | {' | '.join(' '.join(place) for place in places)} |", "|---" * (1 + len(places)) + "|"]
    for method in sorted({row["method"] for row in rows} - {BESIDE}):
        cells = []
        for place in places:
            own, peer = by[*place, method], by[*place, BESIDE]
            seeds = sorted(own.keys() & peer.keys())
            a, b = ([rows_of[seed] for seed in seeds] for rows_of in (own, peer))
            kl, seconds = (mean(a, name) / mean(b, name) if seeds else 0 for name in ("kl", "cpu_seconds"))
            cells.append(f"{kl:.2f} in {seconds:.2f}" if seeds else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
