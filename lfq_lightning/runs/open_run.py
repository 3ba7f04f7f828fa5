"""Open a run's folder: anew, or as an earlier process of the same run has left it."""

from typing import NamedTuple

from lightning.pytorch import Trainer

from lfq_lightning.data import CalibrationData
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.runs.earlier_run import EarlierRun
from lfq_lightning.runs.fingerprint import own_facts, shared_facts
from lfq_lightning.runs.run_folder import RunFolder
from lfq_lightning.runs.spent import Meter
from lfq_lightning.stages import BlockPlan
from lfq_lightning.token_set import TokenSet


class OpenedRun(NamedTuple):
    """The calibration and held-out tokens, and the runs whose blocks can be taken over, in this order."""

    tokens: tuple[TokenSet, TokenSet]
    sources: list[EarlierRun]


def open_run(
    folder: RunFolder,
    reused: EarlierRun | None,
    trainer: Trainer,
    checkpoint: Checkpoint,
    data: CalibrationData,
    plans: list[BlockPlan],
    resolved_config: str | None,
    meter: Meter,
) -> OpenedRun:
    """Make the run's tokens and open its folder; an unfinished run there is resumed.

    Raises UserError if that run, or the one to be reused, differs in what its results depend on.
    """
    resumes, sources = folder.unfinished, [reused]
    checkpoint.check_finite()
    expensive = data.generated
    own = own_facts(plans, data, checkpoint)
    if resumes:
        begun = EarlierRun(folder.path, resumes=True)
        begun.check_version()
        begun.check({"own": own})
        sources = [begun, reused]
    kept = folder.read_tokens() if resumes and expensive else None
    if kept is not None:
        meter.add(kept[1])
    tokens = kept[0] if kept is not None else data.token_sets(checkpoint, trainer.strategy.root_device)
    facts = {"shared": shared_facts(trainer, data.seed, tokens), "own": own}
    for earlier in filter(None, sources):
        earlier.check(facts)
    if resumes:
        # all but the last block: with it comes what is measured of the whole model
        folder.reopen(len(plans) - 1, resolved_config)
        sources[0] = begun = EarlierRun(folder.path, resumes=True)
        meter.add(begun.spent)
    else:
        folder.open(resolved_config, facts, tokens if expensive else None, vars(meter.now()))
    return OpenedRun(tokens, [earlier for earlier in sources if earlier is not None])
