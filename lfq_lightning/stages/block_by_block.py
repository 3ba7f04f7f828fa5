"""The stage that every run begins with: each block by itself, from the first to the last."""

from typing import final

from lfq_lightning.stages.stage import Stage


@final
class BlockByBlock(Stage):
    """Block-wise calibration; the rules that name no stage are its."""

    paper = "BRECQ (arXiv 2102.05426); the final block: LFQ (arXiv 2605.29756)"
    teacher_runs = True
    from_shards = False
    replaces_shards = False
