"""Keep what `lfq eval` has measured of two runs, the last block by LFQ and by MSE, as rows of generation.csv.

python -m benchmarks.generation --case smollm2-w3g64 evaluation.json
The first model of the evaluation is the one by LFQ; docs/results.md has the commands that make both.
"""

import argparse
import csv
import json
from importlib.metadata import version
from pathlib import Path

from lfq_lightning.evaluation.evaluate_models import REFERENCE

RESULTS = Path(__file__).parent / "results" / "generation.csv"
COLUMNS = (
    "case",
    "part",
    "metric",
    "examples",
    "fp",
    "lfq",
    "mse",
    "mse - lfq",
    "unit",
    "p",
    "test",
    "torch",
    "lm-eval",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation")
    parser.add_argument("--case", required=True)
    parser.add_argument("evaluation", type=Path)
    given = parser.parse_args()
    measured = json.loads(given.evaluation.read_text(encoding="utf-8"))
    lfq, mse = measured["models"]
    known = RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if not known:
            writer.writerow(COLUMNS)
        for part, metrics in measured["parts"].items():
            for metric, by in metrics.items():
                values = [f"{by[name]['value']:.4g}" for name in (REFERENCE, lfq, mse)]
                test = by[mse].get("against_first", {})
                found = (
                    (f"{test['difference']:+.4g}", by[mse]["unit"], f"{test['p']:.2g}", test["test"])
                    if test
                    else ("",) * 4
                )
                versions = version("torch"), version("lm-eval")
                writer.writerow((given.case, part, metric, by[mse]["examples"], *values, *found, *versions))


if __name__ == "__main__":
    main()
