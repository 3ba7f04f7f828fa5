"""BlockScheduler: takes one `Trainer.fit` through all blocks of a model. The method first, then Lightning's hooks."""

import logging
import time
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lfq_lightning.calibration.bench import Bench
from lfq_lightning.calibration.lens import Lens
from lfq_lightning.calibration.solve_outer import solve_outer
from lfq_lightning.calibration.stream_store import StreamStore
from lfq_lightning.calibration.weighted_mean import WeightedMean
from lfq_lightning.callbacks import CALLBACKS, BlockCallback
from lfq_lightning.callbacks.block_callback import listeners
from lfq_lightning.callbacks.block_training import BlockInTraining, Fit, check_every
from lfq_lightning.distributed.ranks import ranks_of
from lfq_lightning.evaluation.held_out import final_metrics
from lfq_lightning.ops.path import describe
from lfq_lightning.peak_memory import peak_bytes, reset_peak
from lfq_lightning.plan import Plan
from lfq_lightning.planning.block_work import seconds_left
from lfq_lightning.planning.memory_estimate import Setting
from lfq_lightning.planning.preflight import check_same_precision
from lfq_lightning.report.weight_statistics import weight_statistics
from lfq_lightning.runs.block_state import BlockState
from lfq_lightning.runs.fingerprint import block_fingerprint, outer_fingerprint
from lfq_lightning.runs.open_run import open_run
from lfq_lightning.runs.prepare import PreparedRun, prepare
from lfq_lightning.runs.saving import Saving
from lfq_lightning.runs.shards import Shards
from lfq_lightning.stages import BlockPlan, Rule

log = logging.getLogger(__name__)


@CALLBACKS.register
class BlockScheduler(BlockCallback):
    """Calibrates the blocks in order; an epoch of the Trainer is the training of one block.

    For each block: the teacher runs on the full-precision stream; closed-form quantizers solve on the student stream;
    learned quantizers train from there, and the step with the least held-out loss is kept, the start included; the
    block ships as a shard; the student stream moves on with the weights that ship. With a rule for `whole`, all blocks
    then train once more as one, from what they would ship as.

    Args:
        plan: the rules; first match wins.
        output: folder for the packed model.
        overwrite: replace an earlier run in `output`.
        reuse: folder of another run; its first blocks are taken over as far as plan, model, data and settings agree.
        save_seconds: how often the training of a block is saved, so that a run that ends in its middle resumes there.
        resolved_config: YAML text to keep beside the results.
    """

    paper = "block-wise calibration: BRECQ (arXiv 2102.05426); the final block: LFQ (arXiv 2605.29756)"

    def __init__(
        self,
        plan: list[Rule],
        output: str,
        overwrite: bool = False,
        reuse: str | None = None,
        save_seconds: float = 300.0,
        resolved_config: str | None = None,
    ) -> None:
        self.plan = Plan(plan)
        self.output = output
        self.overwrite = overwrite
        self.reuse = reuse
        self.saving = Saving(save_seconds)
        self.resolved_config = resolved_config
        self.finished = False
        self._run: PreparedRun | None = None
        self._fit: Fit | None = None
        self._block: BlockInTraining | None = None

    # ---- the method: one block after another -------------------------------------------------------------------------

    def _begin(self, fit: Fit, plan: BlockPlan) -> None:
        """Run the teacher, solve in closed form, and put the block on the bench."""
        self.saving.stop_at_once = True
        if self.saving.stopping():
            self.saving.stop(f"the beginning of block {plan.index}")
        started, bench = time.perf_counter(), fit.bench
        reset_peak(bench.device)
        torch.manual_seed(bench.seed * 1_000_003 + plan.index)  # a run that resumes here draws what it would have
        for listener in listeners(bench.trainer):
            listener.on_block_start(bench.trainer, plan)
        read = bench.read(plan)
        # a stage that starts from shards has its weights in the fingerprints before; they are not kept in a name
        fit.fingerprint = block_fingerprint(fit.fingerprint, plan, {} if plan.stage.from_shards else read.tensors())
        module = bench.place(read, plan)
        with bench.forward_only():
            bench.run_teacher()
            solved = bench.restore(partial(fit.shards.shipped, plan)) if plan.stage.from_shards else bench.solve()
        if plan.learned or plan.stage.from_shards:
            bench.shard()
        state = BlockState(module, fit.fingerprint, bench.ranks)
        with bench.forward_only():
            start_loss, start_hidden = bench.held_out()
            head = bench.head()
            lens = Lens(bench.splits.held_out, head, bench.ranks, bench.device)
            start_kl = lens.kl(start_hidden, head)
        state.keep_if_best(start_loss)
        every = check_every(bench.trainer, plan)
        self._block = BlockInTraining(
            plan, solved, state, lens, start_loss, start_hidden, start_kl, started, every, WeightedMean(bench.ranks)
        )
        self._block.resume(self.run.folder.state_file, bench, self.run.meter)
        self.saving.stop_at_once = not plan.learned

    def _end(self, fit: Fit) -> Tensor:
        """Keep the best step, ship it, and move the student stream on with what ships.

        Returns the block's held-out outputs (N, T, D) as they were before its training.
        """
        self.saving.stop_at_once = True
        run, block, bench = self.run, self.block, fit.bench
        plan, start_hidden = block.plan, block.start_hidden
        block.state.load_best()
        weights: dict[str, dict[str, float]] = {}
        for part in bench.parts():
            shipped = {name: block.solved[name] for name in part.linears() if name in block.solved} | part.ship()
            fit.shards.write_block(plan, part, shipped)
            with bench.forward_only():
                cache_error = bench.advance_student(part)
            weights |= {name: weight_statistics(quantized) for name, quantized in shipped.items()}
        with bench.forward_only():
            kl = block.lens.kl(bench.splits.held_out.student, bench.head()) if plan.learned else block.start_kl
            setting = Setting.of(run.data, bench.trainer.precision, bench.ranks.size, bench.device.type != "cpu")
            eta = seconds_left(fit.started, run.plans, fit.taken, plan.index, run.skeleton, setting)
            report = block.report(bench, weights, kl, cache_error, eta)
        run.meter.keep(report.peak_bytes)
        del block, part  # the next one is read when it is free
        self._block = None
        bench.clear()
        written = run.folder.checksums(range(plan.indices.start + 1, plan.indices.stop + 1))
        line = vars(report) | {"fingerprint": fit.fingerprint, "shards": written, "precision": bench.trainer.precision}
        line["spent"] = vars(run.meter.now())
        bench.ranks.once(lambda: run.folder.append_journal(line))
        for listener in listeners(bench.trainer):
            listener.on_block_end(bench.trainer, report)
        return start_hidden

    def _finish(self, fit: Fit, before_last_training: Tensor) -> None:
        """Measure full precision, the last block as it was before training, and what ships; complete the folder."""
        held_out, skeleton, folder = fit.bench.splits.held_out, self.run.skeleton, self.run.folder
        streams = {
            "full_precision": held_out.teacher,
            "before_last_training": before_last_training,
            "quantized": held_out.student,
        }
        head = fit.bench.head(torch.float32)  # the exact one, whatever the products ran in
        metrics = final_metrics(streams, head, fit.bench.tokens[1], fit.frequency, fit.bench.ranks)
        metrics |= {"model_bytes": folder.total_bytes, **vars(self.run.meter.now())}
        if skeleton.checkpoint.method:
            metrics["reference"] = f"weights dequantised from {skeleton.checkpoint.method}"
        dense = [name for name in skeleton.all_linears() if name not in fit.shards.schemes] + skeleton.routers()
        dense += skeleton.checkpoint.extra_layers()
        architecture = skeleton.architecture.__name__
        fit.bench.ranks.once(
            lambda: folder.finish(
                skeleton.checkpoint, architecture, fit.shards.schemes, fit.shards.format, dense, metrics
            )
        )
        self.finished = True
        for listener in listeners(fit.bench.trainer):
            listener.on_run_end(fit.bench.trainer, metrics, folder.path)

    # ---- before the first block --------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
        """Check everything that can be checked without weights and data, and lock the folder. Raises UserError."""
        self._run = prepare(self.plan, self.output, self.overwrite, self.reuse, trainer, module, data)

    def release(self) -> None:
        """Leave signals and the folder to others."""
        self.saving.unlisten()
        self._unlock()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before, device = self.run, trainer.strategy.root_device
        ranks = ranks_of(trainer)
        before.meter.device = device
        check_same_precision(trainer.precision, ranks)
        self.saving.listen(ranks, trainer.strategy.launcher)
        store = StreamStore(device, before.folder.path, *before.data.budgets(trainer.num_devices))
        log.info("quantise-dequantise, logit loss and GPTQ on %s: %s", device, describe(device))
        checkpoint, config = before.module.checkpoint, self.resolved_config
        opened = ranks.once(
            lambda: open_run(
                before.folder, before.reused, trainer, checkpoint, before.data, before.plans, config, before.meter
            )
        )
        train = opened.tokens[0]
        frequency = torch.bincount(train.input_ids[train.mask], minlength=checkpoint.text_config.vocab_size)
        bench = Bench(trainer, before.skeleton, opened.tokens, ranks, store, before.data.seed)
        before.module.bench = bench
        shards = Shards(before.folder, ranks, checkpoint.dtype, self.plan.format)
        shipped = solve_outer(bench, before.outer)
        shards.write_outer(checkpoint.tensors(before.skeleton.outer_names()) | checkpoint.extra(), shipped)
        if shipped:
            bench.ship_outer({name: quantized.dequantize() for name, quantized in shipped.items()})
        before.meter.keep(peak_bytes(device))  # the whole model may have been there, to write the data
        fit = self._fit = Fit(bench, shards, frequency, 0, outer_fingerprint(before.outer), 0.0)
        for listener in listeners(fit.bench.trainer):
            listener.on_run_start(trainer, before.plans)
        for earlier in opened.sources:
            first = fit.taken
            fit.taken, fit.fingerprint = shards.take_over(
                earlier, before.plans, first, fit.fingerprint, bench, before.meter
            )
            log.info("%d of %d blocks taken over from %s", fit.taken - first, len(before.plans), earlier.path)
        fit.started = time.perf_counter()
        self._begin(fit, before.plans[fit.taken])

    # ---- within a block ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # again: Lightning has put its own handler in place, which saves nothing
        self.saving.listen(self.fit.bench.ranks, trainer.strategy.launcher)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.setup_optimizers(trainer)  # a new block: its own parameters, its own schedule
        if self.block.state.step:
            self.block.state.load(self.run.folder.state_file, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        block = self.block
        if not block.plan.learned or batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        stopping = self.saving.stopping()  # here all of the steps before is done, their held-out check included
        if stopping or self.saving.due():
            block.state.save(self.run.folder.state_file, trainer, vars(self.run.meter.now()))
            self.saving.done()
        if stopping:
            self.saving.stop(f"block {block.plan.index}, step {block.state.step}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        block, each, first = self.block, trainer.accumulate_grad_batches, self.fit.bench.first_step
        block.state.step = first + (batch_idx + 1) // each if block.plan.learned else 0
        block.trained = batch_idx + 1 == trainer.num_training_batches
        done = first * each + batch_idx + 1  # checks fall on the same steps, wherever this epoch began
        trainer.val_check_batch = batch_idx + (1 if done % block.check_every == 0 else 2)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.block.held_out_loss = WeightedMean(self.fit.bench.ranks)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        self.block.held_out_loss.add(outputs, batch["mask"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = self.block.held_out_loss.value()
        pl_module.log("held_out/loss", loss, sync_dist=True)  # equal on all ranks
        if not trainer.sanity_checking:
            self.block.state.keep_if_best(loss)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit, block = self.fit, self.block
        if not block.trained:  # stopped in mid-block from outside: max_time, max_steps, another callback
            return
        if block.state.step != block.state.checked_step:  # validation interval and steps need not divide
            with fit.bench.forward_only():
                block.state.keep_if_best(fit.bench.held_out()[0])
        following = block.plan.index + 1
        del block
        start_hidden = self._end(fit)
        if following < len(self.run.plans):
            del start_hidden  # the next block needs its memory
            self._begin(fit, self.run.plans[following])
        else:
            self._finish(fit, start_hidden)
            trainer.should_stop = True

    # ---- the rest of Lightning's hooks -------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._run is None:
            self.prepare(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unlock()  # not the signals: Lightning puts back, after this, the handlers that it has found

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unlock()

    # ---- parts -------------------------------------------------------------------------------------------------------

    @property
    def run(self) -> PreparedRun:
        assert self._run is not None, "`prepare` comes first"
        return self._run

    @property
    def fit(self) -> Fit:
        assert self._fit is not None, "Lightning calls `on_fit_start` before any of these"
        return self._fit

    @property
    def block(self) -> BlockInTraining:
        assert self._block is not None, "every epoch is a block's"
        return self._block

    def _unlock(self) -> None:
        if self._run is not None:
            self._run.folder.unlock()
