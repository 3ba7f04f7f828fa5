"""What each process of the torchrun in test_ranks.py does: one command after another."""

import contextlib
import json
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

from lfq_lightning.calibration.bench import Bench
from lfq_lightning.cli import main


def note_what_is_held(folder: Path) -> None:
    """Write down how many values a rank holds of a block that starts from shards, as each layer is read and after."""
    restore = Bench.restore

    def held(bench: Bench) -> int:
        values = [p for p in bench.current.block.parameters() if not p.is_meta]
        return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in values)

    def watched(bench, read):
        counts = []

        def noting(index):
            counts.append(held(bench))
            return read(index)

        restore(bench, noting)
        bench.shard()
        counts.append(held(bench))
        whole = sum(parameter.numel() for parameter in bench.current.block.parameters())
        (folder / f"held by {bench.ranks.rank}").write_text(json.dumps([count / whole for count in counts]))

    Bench.restore = watched


if __name__ == "__main__":
    commands = Path(sys.argv[1])
    note_what_is_held(commands.parent)
    for line in commands.read_text().splitlines():
        with contextlib.suppress(SystemExit):  # of a run that is meant to stop early
            main(json.loads(line))
