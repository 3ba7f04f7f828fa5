"""What each process of the torchrun in test_ranks.py does: one command after another."""

import contextlib
import json
import sys
import weakref
from pathlib import Path

from torch.distributed.tensor import DTensor

from lfq_lightning.calibration.bench import Bench
from lfq_lightning.cli import main


def note_what_is_held(folder: Path) -> None:
    """Write down how many values a rank holds of a block that starts from shards, as each layer is read and after.

    And how many earlier blocks of the run are alive when one is placed.
    """
    restore, shard, place = Bench.restore, Bench.shard, Bench.place
    counts: list[int] = []

    def held(bench: Bench) -> int:
        values = [p for p in bench.current.block.parameters() if not p.is_meta]
        return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in values)

    def watched_restore(bench, read):
        def noting(index):
            counts.append(held(bench))
            return read(index)

        counts.clear()
        return restore(bench, noting)

    def watched_shard(bench):
        shard(bench)
        if bench.current.plan.stage.from_shards:
            counts.append(held(bench))
            whole = sum(parameter.numel() for parameter in bench.current.block.parameters())
            (folder / f"held by {bench.ranks.rank}").write_text(json.dumps([count / whole for count in counts]))

    def watched_place(bench, block, plan):
        before = vars(bench).setdefault("placed", [])
        with (folder / f"alive on {bench.ranks.rank}").open("a") as file:
            file.write(f"{sum(block() is not None for block in before)}\n")
        before.append(weakref.ref(block))
        return place(bench, block, plan)

    Bench.restore, Bench.shard, Bench.place = watched_restore, watched_shard, watched_place


if __name__ == "__main__":
    commands = Path(sys.argv[1])
    note_what_is_held(commands.parent)
    for line in commands.read_text().splitlines():
        with contextlib.suppress(SystemExit):  # of a run that is meant to stop early
            main(json.loads(line))
