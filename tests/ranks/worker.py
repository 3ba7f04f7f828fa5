"""What each process of a torchrun does in test_ranks.py: run after run in one process group."""

import json
import sys
from pathlib import Path

from lfq_lightning.cli import main
from tests.test_resume import KillAt, KilledError, calibrate, rules_from

if __name__ == "__main__":
    for line in Path(sys.argv[1]).read_text().splitlines():
        given = json.loads(line)
        if "arguments" in given:
            main(given["arguments"])
            continue
        callbacks = [KillAt(given["kill_at"])] if given.get("kill_at") else []
        try:
            calibrate(*given["paths"], *callbacks, rules=rules_from(given["rules"]), **given.get("trainer", {}))
        except KilledError:
            assert callbacks
