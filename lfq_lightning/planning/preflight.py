"""Preflight: find the user's mistakes before anything long starts."""

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy

from lfq_lightning.calibration.calibration_module import CalibrationModule
from lfq_lightning.data import CalibrationData
from lfq_lightning.distributed.fsdp2 import FSDP2
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.optimizers import OPTIMIZERS
from lfq_lightning.planning.memory_estimate import outer_bytes
from lfq_lightning.precision import compute_dtype
from lfq_lightning.quantizers import DenseQuantizer
from lfq_lightning.stages import BlockPlan, LayerPlan

# Lightning's callbacks that change, average or tune the parameters of one model over a whole fit
_OF_ONE_MODEL = (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)


def check_trainer(
    trainer: Trainer, module: LightningModule, data: LightningDataModule | None
) -> tuple[CalibrationModule, CalibrationData]:
    """Return the module and its data. Raises UserError if the Trainer cannot take one fit through all blocks."""
    if not isinstance(module, CalibrationModule) or not isinstance(data, CalibrationData):
        raise UserError("call trainer.fit(CalibrationModule(…), datamodule=CalibrationData(…)).")
    if not isinstance(trainer.strategy, SingleDeviceStrategy | FSDP2):
        raise UserError(
            "parameters change from block to block, which the strategy does not follow (DDP goes out of sync without a "
            "word); set trainer.strategy to fsdp2 for several processes, or to auto."
        )
    check_shares(trainer.num_devices * trainer.num_nodes, data)
    if trainer.reload_dataloaders_every_n_epochs != 1:  # type: ignore[attr-defined]
        raise UserError("each block has its own loaders; set trainer.reload_dataloaders_every_n_epochs to 1.")
    limit = trainer.limit_val_batches
    some = isinstance(limit, int) or limit != 1.0  # 1 is one batch, 1.0 is all
    if some or trainer.overfit_batches or trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            "the best step is chosen on all held-out sequences; leave trainer.limit_val_batches, overfit_batches and "
            "fast_dev_run alone, and lower data.num_held_out for a quick run."
        )
    whole = isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches == 1.0
    if not whole or trainer.check_val_every_n_epoch != 1:
        raise UserError(
            "a block's steps are the plan's, and each block is checked; leave trainer.limit_train_batches and "
            "check_val_every_n_epoch alone, and change `steps`."
        )
    if trainer.min_epochs or trainer.min_steps:
        raise UserError("a run ends with its last block; leave trainer.min_epochs and trainer.min_steps alone.")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _OF_ONE_MODEL):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} works on one model's parameters over the whole fit, and "
                "here each block has its own; remove it."
            )
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if any(scheduler.going_to_accumulate_grad_batches() and len(scheduler.scheduling) > 1 for scheduler in schedulers):
        raise UserError("steps must mean the same in every block; set trainer.accumulate_grad_batches to one number.")
    if not isinstance(trainer.val_check_interval, float):
        raise UserError("blocks differ in steps; give trainer.val_check_interval as a share of them, such as 0.25.")
    compute_dtype(trainer.precision)
    data.check(module.checkpoint)
    return module, data


def check_shares(ranks: int, data: CalibrationData) -> None:
    """Raise UserError if the sequences do not divide among the processes."""
    for name in ("num_samples", "num_held_out"):
        if vars(data)[name] % ranks:
            raise UserError(
                f"data.{name}: {vars(data)[name]} sequences do not divide among {ranks} processes; give a multiple of "
                f"{ranks}."
            )


def check_same_precision(precision: str, ranks: Ranks) -> None:
    """Raise UserError if processes, each on its own machine, have chosen different precisions for `auto`."""
    (halves,) = ranks.total(compute_dtype(precision).itemsize == 2)
    if halves not in (0, ranks.size):
        raise UserError(
            f"trainer.precision: auto is bf16-mixed for {halves:.0f} of {ranks.size} processes, 32-true for the "
            "others; name one of them."
        )


def check_training(ranks: int, plans: list[BlockPlan]) -> None:
    """Raise UserError if the training of a block does not divide among the processes."""
    for plan in plans:
        if plan.learned and plan.batch_size % ranks:
            raise UserError(
                f"plan: block {plan.index} has batches of {plan.batch_size} sequences, which do not divide among "
                f"{ranks} processes; give a batch_size that is a multiple of {ranks}, or fewer processes."
            )
        if plan.learned and not OPTIMIZERS[plan.optimizer].shards and ranks > 1:
            raise UserError(
                f"plan: block {plan.index}: {plan.optimizer} knows no sharded parameters; use adam, whose state "
                "is shared out among the processes, or one process."
            )


def output_bytes(skeleton: ModelSkeleton, plans: list[BlockPlan], outer: dict[str, LayerPlan]) -> int:
    """Return about how many bytes the packed model takes on disk; `outer` is the plan of embeddings and head."""
    width, total = skeleton.checkpoint.dtype.itemsize, outer_bytes(skeleton)
    for name, planned in outer.items():
        rows, columns = skeleton.outer_shape(name)
        total -= int(rows * columns * (width - planned.scheme.bits_per_weight(columns, scale_bits=8 * width) / 8))
    for plan in plans:
        if plan.stage.replaces_shards:
            continue
        for index in plan.indices:
            for name, (o, i) in skeleton.linear_shapes(index).items():
                layer = plan.layers.get(name)
                bits = 8.0 * width
                if layer is not None and not issubclass(layer.closed_form.cls, DenseQuantizer):
                    bits = layer.scheme.bits_per_weight(i, scale_bits=8 * width)
                total += int(o * i * bits / 8)
    return total
