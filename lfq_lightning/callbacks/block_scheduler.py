"""BlockScheduler: the method on one page. Takes one `Trainer.fit` through all blocks of a model."""

import logging
import time
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lfq_lightning.calibration.activation_cache import ActivationCache, Splits
from lfq_lightning.calibration.block_module import BlockModule
from lfq_lightning.calibration.calibration_block import CalibrationBlock
from lfq_lightning.calibration.final_block_module import FinalBlockModule
from lfq_lightning.calibration.fold_scales import fold_scales
from lfq_lightning.calibration.lens import Lens
from lfq_lightning.calibration.solve import Solution, solve
from lfq_lightning.calibration.stream_store import StreamStore
from lfq_lightning.calibration.weighted_mean import WeightedMean
from lfq_lightning.callbacks import CALLBACKS, BlockCallback, BlockReport
from lfq_lightning.distributed.ranks import launched_rank, ranks_of
from lfq_lightning.errors import UserError
from lfq_lightning.evaluation.held_out import final_metrics
from lfq_lightning.formats.compressed_tensors import CompressedTensors
from lfq_lightning.models.checkpoints.small_files import check_small_files
from lfq_lightning.models.head import Head
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.ops.path import describe
from lfq_lightning.peak_memory import peak_bytes, reset_peak
from lfq_lightning.plan import BlockPlan, Plan, Rule
from lfq_lightning.planning.block_flops import block_flops
from lfq_lightning.planning.preflight import check_same_precision, check_trainer, check_training, output_bytes
from lfq_lightning.precision import compute_dtype, stream_dtype
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.report.weight_statistics import weight_statistics
from lfq_lightning.runs.block_state import BlockState, read_facts
from lfq_lightning.runs.earlier_run import EarlierRun
from lfq_lightning.runs.fingerprint import block_fingerprint, own_facts, shared_facts
from lfq_lightning.runs.run_folder import RunFolder
from lfq_lightning.runs.saving import Saving
from lfq_lightning.runs.spent import Spent
from lfq_lightning.token_set import TokenSet

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
        save_seconds: how often the training of a block is saved, so that a run that ends in its middle goes on there.
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
        self.prepared = False
        self.locked: RunFolder | None = None
        self.spent = Spent()
        self.finished = False
        self.state: BlockState
        self.check_every: int

    # ---- one fit: prepare, then block after block --------------------------------------------------------------------

    def prepare(self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
        """Check everything that can be checked without weights and data, and take the folder. Raises UserError."""
        self.run_started, self.peak_bytes = time.perf_counter(), 0
        self.module, self.data = check_trainer(trainer, module, data)
        self.skeleton = ModelSkeleton(self.module.checkpoint)
        self.plans = self.plan.resolve(self.skeleton)
        check_training(trainer.num_devices * trainer.num_nodes, self.plans)
        self.folder = RunFolder(self.output, len(self.skeleton) + 1, self.overwrite, self.module.checkpoint.family)
        if launched_rank() == 0:
            check_small_files(self.module.checkpoint)
            again = 2 if self.plans[-1].whole else 1  # then all shards are written beside the first ones
            self.folder.check(again * output_bytes(self.skeleton, self.plans))
        self.earlier = EarlierRun(self.reuse, goes_on=False) if self.reuse else None
        if self.earlier is not None and self.earlier.path.resolve() == self.folder.path.resolve():
            raise UserError("reuse: it is the output itself; give another output.")
        if launched_rank() == 0:
            self.folder.lock()
            self.locked = self.folder
            self.folder.check(0)  # once more: another run may have ended in between
        self.prepared = True

    def release(self) -> None:
        """Leave signals and the folder to others."""
        self.saving.unlisten()
        self._unlock()

    def _unlock(self) -> None:
        if self.locked is not None:
            self.locked.unlock()
            self.locked = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.prepared:
            self.prepare(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unlock()  # not the signals: Lightning puts back, after this, the handlers that it has found

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unlock()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer, self.device = trainer, trainer.strategy.root_device
        self.ranks = ranks_of(trainer)
        check_same_precision(trainer.precision, self.ranks)
        self.saving.listen(self.ranks, trainer.strategy.launcher)
        self.store = StreamStore(self.device, self.folder.path, *self.data.budgets(trainer.num_devices))
        log.info("quantise-dequantise, logit loss and GPTQ on %s: %s", self.device, describe(self.device))
        self.tokens, sources = self.ranks.once(self._open)
        train, held_out = self.tokens
        self.frequency = torch.bincount(
            train.input_ids[train.mask], minlength=self.skeleton.checkpoint.config.vocab_size
        )
        self.splits = Splits(self._cache("train", train), self._cache("held_out", held_out))
        self._write_shard(0, self.skeleton.checkpoint.tensors(self.skeleton.outer_names()))
        self.schemes: dict[str, QuantScheme] = {}
        self.peak_bytes = peak_bytes(self.device)  # the whole model may have been there, to write the data
        for listener in self._listeners():
            listener.on_run_start(self.trainer, self.plans)
        self.fingerprint = ""
        self.taken = 0
        for earlier in sources:
            before, self.taken = self.taken, self._take_over(earlier, self.taken)
            log.info("%d of %d blocks taken over from %s", self.taken - before, len(self.plans), earlier.path)
        self.blocks_started = time.perf_counter()
        self._begin(self.plans[self.taken])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # again: Lightning has put its own handler in place, which saves nothing
        self.saving.listen(self.ranks, trainer.strategy.launcher)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.setup_optimizers(trainer)  # a new block: its own parameters, its own schedule
        if self.state.step:
            self.state.load(self.folder.state_file, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        each = trainer.accumulate_grad_batches
        if not self.current.plan.learned or batch_idx == 0 or batch_idx % each:
            return
        stopping = self.saving.stopping()  # here all of the steps before is done, their held-out check included
        if stopping or self.saving.due():
            self.state.save(self.folder.state_file, trainer, vars(self._spent()))
            self.saving.done()
        if stopping:
            self.saving.stop(f"block {self.current.plan.index}, step {self.state.step}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        each = trainer.accumulate_grad_batches
        self.state.step = self.module.first_step + (batch_idx + 1) // each if self.current.plan.learned else 0
        self.trained = batch_idx + 1 == trainer.num_training_batches
        done = self.module.first_step * each + batch_idx + 1  # checks fall on the same steps, wherever this epoch began
        trainer.val_check_batch = batch_idx + (1 if done % self.check_every == 0 else 2)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.held_out_loss = WeightedMean(self.ranks)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        self.held_out_loss.add(outputs, batch["mask"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = self.held_out_loss.value()
        pl_module.log("held_out/loss", loss, sync_dist=True)  # equal on all ranks
        if not trainer.sanity_checking:
            self.state.keep_if_best(loss)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.trained:  # stopped in mid-block from outside: max_time, max_steps, another callback
            return
        if self.state.step != self.state.checked_step:  # validation interval and steps need not divide
            with self._forward_only():
                self.state.keep_if_best(self._held_out()[0])
        following = self.current.plan.index + 1
        self._end()
        if following < len(self.plans):
            self._begin(self.plans[following])
        else:
            self._finish()
            trainer.should_stop = True

    # ---- one block ---------------------------------------------------------------------------------------------------

    def _begin(self, plan: BlockPlan) -> None:
        """Run the teacher, solve in closed form, and put the block on the bench."""
        self.saving.stop_at_once = True
        if self.saving.stopping():
            self.saving.stop(f"the beginning of block {plan.index}")
        self.block_started = time.perf_counter()
        reset_peak(self.device)
        torch.manual_seed(self.data.seed * 1_000_003 + plan.index)  # a run that goes on here draws what it would have
        for listener in self._listeners():
            listener.on_block_start(self.trainer, plan)
        self.block = self.skeleton.block(plan.indices, plan.activation_checkpointing).to(self.device)
        self.fingerprint = block_fingerprint(self.fingerprint, plan, self.block.tensors())
        self.current = self._module(plan)
        with self._forward_only():
            for split in self.splits.each():
                if not plan.whole:  # for which the teacher has run through all blocks already
                    split.advance_teacher(self.block, self.device, keep=plan.needs_reference)
                split.set_target(self._target, self.device)
            self._check_finite(plan.index, "full-precision", [split.teacher for split in self.splits.each()])
            solutions = self._written(plan) if plan.whole else self._solve(plan)
        for name, layer in plan.layers.items():
            if layer.learned is not None:
                start = solutions.pop(name)  # what training starts from is let go of when its layer has it
                self.block.train_linear(name, layer.learned.build(start.latent, start.quantized).to(self.device))
        self.solved = {name: solution.quantized for name, solution in solutions.items()}
        if plan.learned:
            self.ranks.shard(self.current)
        self.module.block, self.trained = self.current, False
        self.state = BlockState(self.current, self.fingerprint, self.ranks)
        self.data.place(self.splits, plan, 0)
        with self._forward_only():
            self.start_loss, self.start_hidden = self._held_out()
            head = self._head()
            self.lens = Lens(self.splits.held_out, head, self.ranks, self.device)
            self.start_kl = self.lens.kl(self.start_hidden, head)
        self.state.keep_if_best(self.start_loss)
        self._find_place(plan)
        self.saving.stop_at_once = not plan.learned

    def _find_place(self, plan: BlockPlan) -> None:
        """Begin the block's training where an earlier run has left it, if it has."""
        left = self.ranks.once(lambda: read_facts(self.folder.state_file, self.fingerprint))
        self.state.step = left.get("step", 0)
        if self.state.step:
            log.info("block %d resumes from step %d", plan.index, self.state.step)
            self.spent = self.spent.most(left["spent"])
        self.module.first_step = self.state.step
        self.data.place(self.splits, plan, self.state.step)
        batches = plan.steps * self.trainer.accumulate_grad_batches if plan.learned else 1
        interval = self.trainer.val_check_interval
        assert isinstance(interval, float), "preflight has checked that"
        self.check_every = max(1, int(batches * interval))

    def _end(self) -> None:
        """Keep the best step, ship it, and move the student stream on with what ships."""
        self.saving.stop_at_once = True
        self.state.load_best()
        self.ranks.gather(self.current)
        plan = self.current.plan
        shipped = self.solved | self.block.ship()
        self._write(plan, shipped)
        with self._forward_only():
            for split in self.splits.each():
                split.advance_student(self.block, self.device)
            self._check_finite(plan.index, "quantised", [split.student for split in self.splits.each()])
            kl_after = self.lens.kl(self.splits.held_out.student, self._head()) if plan.learned else self.start_kl
            report = self._report(plan, shipped, kl_after)
        self.peak_bytes = max(self.peak_bytes, report.peak_bytes)
        self._let_go()
        written = self.folder.checksums(range(plan.indices.start + 1, plan.indices.stop + 1))
        line = vars(report) | {"fingerprint": self.fingerprint, "shards": written, "precision": self.trainer.precision}
        line["spent"] = vars(self._spent())
        self.ranks.once(lambda: self.folder.append_journal(line))
        for listener in self._listeners():
            listener.on_block_end(self.trainer, report)

    def _let_go(self) -> None:
        """Free the block; the next one is read only then."""
        del self.block, self.current, self.state, self.solved, self.lens
        self.module.block = None
        strategy = self.trainer.strategy
        strategy.optimizers, strategy.lr_scheduler_configs = [], []
        self.ranks.let_go()

    def _take_over(self, earlier: EarlierRun, first: int) -> int:
        """Take an earlier run's blocks from `first` on, as far as plan and weights agree; return the next one."""
        for plan in self.plans[first:-1]:
            block = self.skeleton.block(plan.indices).to(self.device)
            fingerprint = block_fingerprint(self.fingerprint, plan, block.tensors())
            report = earlier.report(plan.index, fingerprint)
            if report is None and plan.index == 0 and not earlier.goes_on:
                raise UserError(f"reuse: {earlier.path} did not begin with this model and plan; leave reuse away.")
            if report is None:
                return plan.index
            shards = self._shards(earlier, plan)
            stored = dict(ChainMap(*shards.values()))
            schemes = {name: p.scheme for name, p in plan.layers.items() if f"{name}.weight_packed" in stored}
            with self._forward_only():
                for split in self.splits.each():
                    split.advance_teacher(block, self.device)
                block.load(CompressedTensors().dequantize(stored, schemes))
                for split in self.splits.each():
                    split.advance_student(block, self.device)
            for (number, tensors), digest in zip(shards.items(), report["shards"].values(), strict=True):
                if earlier.goes_on:
                    self.folder.note_shard(number, tensors, digest)
                else:
                    self._write_shard(number, tensors)
            if not earlier.goes_on:
                line = report | {"shards": self.folder.checksums(shards), "spent": vars(self._spent())}
                self.ranks.once(partial(self.folder.append_journal, line))
            self.schemes |= schemes
            self.fingerprint = fingerprint
        return self.plans[-1].index

    def _finish(self) -> None:
        """Measure full precision, the last block as it was before training, and what ships; complete the folder."""
        held_out, tokens = self.splits.held_out, self.tokens[1]
        streams = {
            "full_precision": held_out.teacher,
            "before_last_training": self.start_hidden,
            "quantized": held_out.student,
        }
        head = self.skeleton.head(torch.float32).to(self.device)  # the exact one, whatever the products ran in
        metrics = final_metrics(streams, head, tokens, self.frequency, self.ranks)
        metrics |= {
            "model_bytes": self.folder.total_bytes,
            **vars(self._spent()),
        }
        dense = [name for name in self.skeleton.all_linears() if name not in self.schemes]
        dense += self.skeleton.routers()
        checkpoint, architecture = self.skeleton.checkpoint, self.skeleton.architecture
        self.ranks.once(lambda: self.folder.finish(checkpoint, architecture, self.schemes, dense, metrics))
        self.finished = True
        for listener in self._listeners():
            listener.on_run_end(self.trainer, metrics, self.folder.path)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _module(self, plan: BlockPlan) -> CalibrationBlock:
        objective, clips = plan.objective.build(), bool(self.trainer.gradient_clip_val)
        if objective.logit_space:
            return FinalBlockModule(self.block, objective, plan, self._head(), clips).to(self.device)
        return BlockModule(self.block, objective, plan, clips).to(self.device)

    def _solve(self, plan: BlockPlan) -> dict[str, Solution]:
        train, dtype = self.splits.train, self.skeleton.checkpoint.dtype
        inputs, reference = (partial(way, self.device) for way in (train.student_batches, train.reference_batches))
        try:
            family = self.skeleton.checkpoint.family
            observed = fold_scales(self.block, plan.layers, inputs, family, dtype, self.ranks)
            return solve(self.block, plan.layers, inputs, dtype, reference, self.ranks, observed)
        except ArithmeticError as error:
            raise UserError(f"block {plan.index}: {error}; try trainer.precision 32-true or more samples.") from error

    def _written(self, plan: BlockPlan) -> dict[str, Solution]:
        """Give the block the weights that are on disk, and the student stream what enters the first of its layers."""
        for split, tokens in zip(self.splits.each(), self.tokens, strict=True):
            split.restart_student(self._embed(tokens))
        stored = dict(ChainMap(*self._shards(EarlierRun(self.folder.path, goes_on=True), plan).values()))
        self.block.load(CompressedTensors().dequantize(stored, self.schemes))
        found = {name: CompressedTensors().unpack(name, stored, self.schemes[name]) for name in plan.layers}
        return {
            name: Solution(quantized.to(self.device), quantized.exact().to(self.device))
            for name, quantized in found.items()
        }

    def _open(self) -> tuple[tuple[TokenSet, TokenSet], list[EarlierRun]]:
        """Open the folder, or what an earlier run has left in it; return the data and the runs to take blocks from."""
        goes_on, checkpoint, sources = self.folder.unfinished, self.module.checkpoint, [self.earlier]
        checkpoint.check_finite()
        dear = self.data.generated
        own = own_facts(self.plans, self.data, checkpoint)
        if goes_on:
            begun = EarlierRun(self.folder.path, goes_on=True)
            begun.check({"own": own})
            sources = [begun, self.earlier]
        kept = self.folder.read_tokens() if goes_on and dear else None
        if kept is not None:
            self.spent = self.spent.most(kept[1])
        tokens = kept[0] if kept is not None else self.data.token_sets(checkpoint, self.device)
        facts = {"shared": shared_facts(self.trainer, self.data.seed, tokens), "own": own}
        for earlier in filter(None, sources):
            earlier.check(facts)
        if goes_on:
            # all but the last block: with it comes what is measured of the whole
            self.folder.reopen(len(self.plans) - 1, self.resolved_config)
            sources[0] = begun = EarlierRun(self.folder.path, goes_on=True)
            self.spent = self.spent.most(begun.spent)
        else:
            self.folder.open(self.resolved_config, facts, tokens if dear else None, vars(self._spent()))
        return tokens, [earlier for earlier in sources if earlier is not None]

    def _embed(self, tokens: TokenSet) -> Iterator[Tensor]:
        """Yield what enters the first block, (1, T, D), for each of this rank's sequences."""
        dtype = stream_dtype(self.trainer.precision)
        for ids in tokens.input_ids[self.ranks.share(len(tokens))]:
            yield self.skeleton.embed(ids[None]).to(dtype)

    def _cache(self, name: str, tokens: TokenSet) -> ActivationCache:
        return ActivationCache(name, self._embed(tokens), tokens, self.ranks, self.store)

    def _head(self) -> Head:
        """Return the frozen head in the dtype of its products. It is not kept: beside a block it would be large."""
        return self.skeleton.head(compute_dtype(self.trainer.precision)).to(self.device)

    def _target(self, hidden: Tensor) -> dict[str, Tensor]:
        objective, head = self.current.objective, self.current.head
        return objective.checked_target(objective.view(hidden, head), head)

    def _held_out(self) -> tuple[float, Tensor]:
        """Return the held-out loss now, as validation computes it, and the block's outputs."""
        mean, outputs = WeightedMean(self.ranks), []
        for quantizer in self.current.quantizers():
            quantizer.eval()
        for batch in self.data.val_dataloader():
            batch = self.module.transfer_batch_to_device(batch, self.device, 0)
            hidden, loss = self.current(batch)
            mean.add(loss, batch["mask"])
            outputs.append(hidden.to(self.splits.held_out.student))
        for quantizer in self.current.quantizers():
            quantizer.train()
        return mean.value(), torch.cat(outputs)

    def _check_finite(self, index: int, which: str, streams: list[Tensor]) -> None:
        broken = sum(not bool(sequence.isfinite().all()) for stream in streams for sequence in stream)
        if self.ranks.total(broken) != [0]:
            raise UserError(
                f"block {index}: its {which} activations hold NaN or infinity; the model overflows in "
                f"{self.trainer.precision}, or its weights are broken; try trainer.precision 32-true."
            )

    def _shards(self, run: EarlierRun, plan: BlockPlan) -> dict[int, dict[str, Tensor]]:
        return {index + 1: run.shard(index + 1, self.folder.shards, self.folder.family) for index in plan.indices}

    def _write(self, plan: BlockPlan, shipped: dict[str, QuantizedTensor]) -> None:
        replaced, dtype = {f"{name}.weight" for name in shipped}, self.skeleton.checkpoint.dtype
        dense = {name: tensor for name, tensor in self.block.tensors().items() if name not in replaced}
        for index, layer in zip(plan.indices, self.block.names, strict=True):
            prefix = f"{layer}."
            tensors = {name: tensor.to(dtype).cpu() for name, tensor in dense.items() if name.startswith(prefix)}
            for name, quantized in shipped.items():
                if name.startswith(prefix):
                    tensors |= CompressedTensors().pack(name, quantized)
                    self.schemes[name] = quantized.scheme
            self._write_shard(index + 1, tensors, again=plan.whole)

    def _write_shard(self, number: int, tensors: dict[str, Tensor], again: bool = False) -> None:
        self.ranks.once(lambda: self.folder.write_shard(number, tensors, again))
        self.folder.note_shard(number, tensors)

    def _report(self, plan: BlockPlan, shipped: dict[str, QuantizedTensor], kl_after: float) -> BlockReport:
        tokens, held_out = (self.data.seq_len * len(split) for split in self.splits.each())
        flops = [block_flops(p, self.skeleton, tokens, held_out, self.data.seq_len) for p in self.plans]
        now = time.perf_counter()
        done, todo = sum(flops[self.taken : plan.index + 1]), sum(flops[plan.index + 1 :])
        return BlockReport(
            index=plan.index,
            name="the whole model" if plan.whole else " + ".join(self.block.names),
            objective=plan.objective.name,
            quantizers=sorted({(layer.learned or layer.closed_form).name for layer in plan.layers.values()}),
            loss_before=self.start_loss,
            loss_after=self.state.best_loss,
            loss_last=self.state.last_loss,
            best_step=self.state.best_step,
            kl_before=self.start_kl,
            kl_after=kl_after,
            seconds=now - self.block_started,
            peak_bytes=peak_bytes(self.device),
            weights={name: weight_statistics(quantized) for name, quantized in shipped.items()},
            eta_seconds=(now - self.blocks_started) * todo / done,
        )

    def _spent(self) -> Spent:
        """Return what the run has taken so far, with what earlier parts of it took."""
        seconds = self.spent.seconds + time.perf_counter() - self.run_started
        return Spent(seconds, max(self.spent.peak_bytes, self.peak_bytes, peak_bytes(self.device)))

    def _listeners(self) -> list[BlockCallback]:
        everyone = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in everyone if isinstance(callback, BlockCallback)]

    @contextmanager
    def _forward_only(self) -> Iterator[None]:
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            yield
