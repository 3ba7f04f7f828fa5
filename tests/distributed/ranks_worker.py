"""What each process of the torchrun in test_ranks.py does: one command after another."""

import contextlib
import json
import sys
from pathlib import Path

from lfq_lightning.cli import main

if __name__ == "__main__":
    for line in Path(sys.argv[1]).read_text().splitlines():
        with contextlib.suppress(SystemExit):  # of a run that is meant to stop early
            main(json.loads(line))
