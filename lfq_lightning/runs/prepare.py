"""Prepare a run: everything that can be checked without weights and data, in the first seconds."""

import logging
from dataclasses import dataclass

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lfq_lightning.calibration.calibration_module import CalibrationModule
from lfq_lightning.data import CalibrationData
from lfq_lightning.distributed.ranks import launched_rank
from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints.small_files import check_small_files
from lfq_lightning.models.coverage import coverage
from lfq_lightning.models.families import FAMILIES
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.models.streamed import check_streams
from lfq_lightning.plan import Plan
from lfq_lightning.planning.preflight import check_trainer, check_training, output_bytes
from lfq_lightning.runs.earlier_run import EarlierRun
from lfq_lightning.runs.run_folder import RunFolder
from lfq_lightning.runs.spent import Meter
from lfq_lightning.stages import BlockPlan, LayerPlan

log = logging.getLogger(__name__)

_MOST = 0.9  # of the blocks' parameters that can be packed: below it is said what cannot


@dataclass(frozen=True)
class PreparedRun:
    """A checked run; its folder is locked by the first rank."""

    module: CalibrationModule
    data: CalibrationData
    skeleton: ModelSkeleton
    plans: list[BlockPlan]
    outer: dict[str, LayerPlan]
    folder: RunFolder
    reused: EarlierRun | None
    meter: Meter


def prepare(
    plan: Plan,
    output: str,
    overwrite: bool,
    reuse: str | None,
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | None,
) -> PreparedRun:
    """Check trainer, model, plan and folder, and lock the folder. Raises UserError."""
    meter = Meter()
    calibrated, tokens = check_trainer(trainer, module, data)
    checkpoint = calibrated.checkpoint
    skeleton = ModelSkeleton(checkpoint)
    plans, outer = plan.resolve(skeleton), plan.outer(skeleton)
    if launched_rank() == 0 and (covered := coverage(skeleton)).share < _MOST:
        log.warning(
            "%s: %.0f %% of its layers' weights stay in full precision, since transformers loads no packed %s",
            checkpoint.path,
            100 * (1 - covered.share),
            ", ".join(covered.large),
        )
    check_training(trainer.num_devices * trainer.num_nodes, plans)
    folder = RunFolder(output, len(skeleton) + 1, overwrite, checkpoint.family)
    if launched_rank() == 0:
        check_small_files(checkpoint)
        twice = any(plan.stage.replaces_shards for plan in plans)  # then shards are written beside the first ones
        folder.check((1 + twice) * output_bytes(skeleton, plans, outer))
    reused = EarlierRun(reuse, resumes=False) if reuse else None
    if reused is not None and reused.path.resolve() == folder.path.resolve():
        raise UserError("reuse: it is the output itself; give another output.")
    if checkpoint.config.model_type not in FAMILIES:
        check_streams(checkpoint)  # last, since it computes
    if launched_rank() == 0:
        folder.lock()
        try:
            folder.check(0)  # once more: another run may have ended in between
        except UserError:
            folder.unlock()
            raise
    return PreparedRun(calibrated, tokens, skeleton, plans, outer, folder, reused, meter)
