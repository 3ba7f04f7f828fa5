"""python -m benchmarks.families [TYPE …]: measure types, one process each; then write the table."""

import csv
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "families.csv"
_LONGEST = 180  # seconds for one type


def main(chosen: list[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import transformers

    import lfq_lightning.run  # noqa: F401  (once, before the forks)
    from benchmarks.families.measure import COLUMNS
    from benchmarks.families.table import write_table
    from benchmarks.families.tiny_model import model_types

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = {row["type"]: row for row in csv.DictReader(RESULTS.open())} if RESULTS.exists() else {}
    for model_type in chosen or [each for each in model_types() if each not in rows]:
        row = {"type": model_type} | _in_a_child(model_type)
        rows[model_type] = {column: str(row.get(column, "")) for column in COLUMNS}
        print(" ".join(rows[model_type].values())[:200], flush=True)
        with RESULTS.open("w", newline="") as file:  # after each: a sweep that is stopped keeps what it has
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(rows[name] for name in sorted(rows))
    write_table([rows[name] for name in sorted(rows)], transformers.__version__)


def _in_a_child(model_type: str) -> dict[str, object]:
    """Measure in a fork: a crash or a hang costs one type."""
    from benchmarks.families.measure import measure

    with tempfile.TemporaryDirectory() as name:
        answer, started = Path(name) / "answer.json", time.monotonic()
        child = os.fork()
        if child == 0:
            os.setsid()
            log = os.open(Path(name) / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(name)
            answer.write_text(json.dumps(measure(model_type, Path(name)), default=str))
            os._exit(0)
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() - started > _LONGEST:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"verdict": "too long", "reason": f"more than {_LONGEST} s"}
            time.sleep(0.05)
        return json.loads(answer.read_text()) if answer.is_file() else {"verdict": "crashed"}


if __name__ == "__main__":
    main(sys.argv[1:])
