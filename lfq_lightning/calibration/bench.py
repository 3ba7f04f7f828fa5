"""Bench: where one block at a time stands, between the two streams of activations that run through all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lfq_lightning.calibration.activation_cache import ActivationCache, BatchLoader, Splits
from lfq_lightning.calibration.block_module import BlockModule
from lfq_lightning.calibration.cache_error import CacheError
from lfq_lightning.calibration.calibration_block import CalibrationBlock
from lfq_lightning.calibration.final_block_module import FinalBlockModule
from lfq_lightning.calibration.find_folds import FoundFolds
from lfq_lightning.calibration.fold_scales import fold_scales
from lfq_lightning.calibration.solve import Solution, solve
from lfq_lightning.calibration.stream_store import StreamStore
from lfq_lightning.calibration.weighted_mean import WeightedMean
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.head import Head
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.peak_memory import return_freed_memory
from lfq_lightning.precision import compute_dtype, stream_dtype
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.stages import BlockPlan
from lfq_lightning.token_set import TokenSet

Shipped = tuple[dict[str, Tensor], dict[str, QuantizedTensor]]

_SAMPLED_TOKENS = 2**14  # what an objective sees before it keeps anything of the teacher


class Bench(nn.Module):
    """What calibrating any block needs: both streams of both splits, the frozen head, and the block's batches.

    A module with the block as its one submodule, so that Lightning's train and eval modes reach it.

    Args:
        trainer: its precision and device are the blocks'.
        skeleton: where blocks and head come from.
        tokens: of calibration and of the held-out split.
        ranks: each has its share of the sequences.
        store: where the streams lie.
        seed: of the order of batches.
    """

    def __init__(
        self,
        trainer: Trainer,
        skeleton: ModelSkeleton,
        tokens: tuple[TokenSet, TokenSet],
        ranks: Ranks,
        store: StreamStore,
        seed: int,
    ) -> None:
        super().__init__()
        self.trainer = trainer
        self.device = trainer.strategy.root_device
        self.skeleton = skeleton
        self.tokens = tokens
        self.ranks = ranks
        self.seed = seed
        self.first_step = 0  # of the block's training: one that resumes does not begin at 0
        self._current: CalibrationBlock | None = None
        self._parts: list[DecoderBlock] = []
        self._cache_error: CacheError | None = None
        self._folds = FoundFolds()
        self.splits = Splits(
            *(
                ActivationCache(name, self._embed(some), skeleton.width, some, ranks, store)
                for name, some in zip(("train", "held_out"), tokens, strict=True)
            )
        )

    def ship_outer(self, weights: dict[str, Tensor]) -> None:
        """Let the student have the embeddings and the head that ship, from its first block on."""
        self.skeleton.ship(weights)
        for split, tokens in zip(self.splits.each(), self.tokens, strict=True):
            split.restart_student(self._embed(tokens, shipped=True))

    # ---- the block ---------------------------------------------------------------------------------------------------

    @property
    def current(self) -> CalibrationBlock:
        """The block on the bench."""
        assert self._current is not None, "a block is placed before anything is asked of it"
        return self._current

    @property
    def cache_error(self) -> CacheError:
        assert self._cache_error is not None, "a block is placed before anything is asked of it"
        return self._cache_error

    def read(self, plan: BlockPlan) -> DecoderBlock:
        """Return a block in full precision, fp32, on the device; without weights if it starts from shards."""
        block = self.skeleton.block(plan.indices, plan.activation_checkpointing, empty=plan.stage.from_shards)
        return block if plan.stage.from_shards else block.to(self.device)

    def place(self, block: DecoderBlock, plan: BlockPlan) -> CalibrationBlock:
        """Put a block on the bench, with its objective; what it is compared by decides which module it becomes."""
        objective, clips = plan.objective.build(), bool(self.trainer.gradient_clip_val)
        objective.to(self.device)
        module: CalibrationBlock
        if objective.logit_space:
            module = FinalBlockModule(block, objective, plan, self.head(), clips)
        else:
            module = BlockModule(block, objective, plan, clips)
        self._current, self.first_step = module, 0
        self._parts = block.parts() if plan.stage.from_shards else [block]
        self._cache_error = CacheError(block, self.ranks)
        return module

    def clear(self) -> None:
        """Free the block, with its optimizer; the next one is read only then."""
        self._current, self._parts, self._cache_error = None, [], None
        self.trainer.strategy.optimizers, self.trainer.strategy.lr_scheduler_configs = [], []
        self.ranks.release()

    # ---- what it starts from -----------------------------------------------------------------------------------------

    def run_teacher(self) -> None:
        """Run the full-precision block, unless its stream stands behind it already, and keep what the objective needs.

        Raises UserError for activations that are not finite.
        """
        plan = self.current.plan
        for split in self.splits.each():
            if plan.stage.teacher_runs:
                noting = split is self.splits.held_out
                with self.cache_error.noting_teacher() if noting else nullcontext():
                    split.advance_teacher(self.current.block, self.device, keep=plan.needs_reference)
        self.current.objective.prepare(self._some_rows, self._teachers_head(), self.ranks)
        for split in self.splits.each():
            split.set_target(self._target, self.device)
        self._check_finite("full-precision", [split.teacher for split in self.splits.each()])

    def solve(self) -> dict[str, QuantizedTensor]:
        """Fold scales and quantise the block's layers in closed form, on the student stream; begin training there.

        Returns the codes of the layers that are not trained. Raises UserError.
        """
        train, dtype = self.splits.train, self.skeleton.checkpoint.dtype
        inputs, reference = (partial(way, self.device) for way in (train.student_batches, train.reference_batches))
        block, plan = self.current.block, self.current.plan
        try:
            family = self.skeleton.checkpoint.family
            observed = fold_scales(block, plan.layers, inputs, family, dtype, self.ranks, self._folds)
            solutions = solve(block, plan.layers, inputs, dtype, reference, self.ranks, observed)
        except ArithmeticError as error:
            raise UserError(f"block {plan.index}: {error}; try trainer.precision 32-true or more samples.") from error
        self._train_from(block, solutions)
        return {name: solution.quantized for name, solution in solutions.items()}

    def restore(self, read: Callable[[int], Shipped]) -> dict[str, QuantizedTensor]:
        """Begin training at what is on disk, and give the student stream what enters the first of the block's layers.

        One layer is whole at a time: each rank keeps its share of it before the next is read.

        Args:
            read: returns the weights that have shipped of a decoder layer, and the codes of its planned layers.

        Returns the codes of the layers that are not trained.
        """
        solved: dict[str, QuantizedTensor] = {}
        for split, tokens in zip(self.splits.each(), self.tokens, strict=True):
            split.restart_student(self._embed(tokens, shipped=True))
        for index, part in zip(self.current.plan.indices, self._parts, strict=True):
            weights, codes = read(index)
            part.load(weights, self.device)
            starts = {
                name: Solution(quantized.to(self.device), quantized.exact().to(self.device))
                for name, quantized in codes.items()
            }
            del weights, codes
            self._train_from(part, starts)
            solved |= {name: solution.quantized for name, solution in starts.items()}
            self.ranks.shard(*part.layers)
            del starts
            return_freed_memory()
        return solved

    def _train_from(self, block: DecoderBlock, solutions: dict[str, Solution]) -> None:
        """Let layers that are trained begin at their solutions, which are taken out: they are released one by one."""
        learned = {name: layer.learned for name, layer in self.current.plan.layers.items() if name in solutions}
        with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):  # what they make may be trained
            for name, quantizer in learned.items():
                if quantizer is not None:
                    start = solutions.pop(name)
                    block.train_linear(name, quantizer.build(start.latent, start.quantized).to(self.device))

    def shard(self) -> None:
        """Leave each rank its share of the block's parameters; a layer is whole only while it runs."""
        self.ranks.shard(*(self.current.block.layers if len(self.current.plan.indices) > 1 else ()), self.current)

    # ---- its training ------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> BatchLoader:
        """Return the batches of the block's training; a block with nothing to train gets one."""
        plan, each = self.current.plan, self.trainer.accumulate_grad_batches
        batches = plan.steps * each if plan.learned else 1
        order = self.seed * 1_000_003 + plan.index
        return self.splits.train.shuffled(plan.batch_size, batches, order, skip=self.first_step * each)

    def val_dataloader(self) -> BatchLoader:
        """Return the held-out batches."""
        return self.splits.held_out.in_order(self.current.plan.batch_size)

    def held_out(self) -> tuple[float, Tensor]:
        """Return the held-out loss now, as validation computes it, and the block's outputs (N, T, D)."""
        mean, outputs = WeightedMean(self.ranks), []
        for quantizer in self.current.quantizers():
            quantizer.eval()
        for batch in self.val_dataloader():
            batch = self.trainer.lightning_module.transfer_batch_to_device(batch, self.device, 0)
            hidden, loss = self.current(batch)
            mean.add(loss, batch["mask"])
            outputs.append(self.current.block.hidden_states(hidden).to(self.splits.held_out.student))
        for quantizer in self.current.quantizers():
            quantizer.train()
        return mean.value(), torch.cat(outputs)

    # ---- behind it ---------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[DecoderBlock]:
        """Yield the block, whole on every rank; of a stage that starts from shards its layers, one at a time.

        Each is to be shipped and passed by before the next.
        """
        for part in self._parts:
            with self.ranks.whole(self.current if part is self.current.block else part):
                yield part
            if part is not self.current.block:
                part.release()

    def advance_student(self, part: DecoderBlock) -> dict[str, float]:
        """Move the student stream on with the weights that ship; return the errors of `keys` and `values` (CacheError).

        Raises UserError if the stream is not finite.
        """
        errors: dict[str, float] = {}
        self.splits.train.advance_student(part, self.device)
        with self.cache_error.comparing_student(self.splits.held_out.masks(), errors):
            self.splits.held_out.advance_student(part, self.device)
        self._check_finite("quantised", [split.student for split in self.splits.each()])
        return errors

    def pass_by(self, block: DecoderBlock, weights: dict[str, Tensor]) -> None:
        """Move both streams past a block that is done: in full precision, and with the `weights` that ship."""
        for split in self.splits.each():
            split.advance_teacher(block, self.device)
        block.load(weights, self.device)
        for split in self.splits.each():
            split.advance_student(block, self.device)

    def head(self, dtype: torch.dtype | None = None) -> Head:
        """Return the frozen head, its products in `dtype` or the run's. It is not kept: beside a block it is large."""
        return self.skeleton.head(dtype or compute_dtype(self.trainer.precision)).to(self.device)

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """Without gradients, in the run's precision."""
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            yield

    def _embed(self, tokens: TokenSet, shipped: bool = False) -> Iterator[Tensor]:
        """Yield what enters the first block, (1, T, D), for each of this rank's sequences."""
        dtype = stream_dtype(self.trainer.precision)
        for ids in tokens.input_ids[self.ranks.share(len(tokens))]:
            yield self.skeleton.embed(ids[None], shipped).to(dtype)

    def _target(self, hidden: Tensor) -> dict[str, Tensor]:
        return self.current.objective.checked_target(self._viewed(hidden), self._teachers_head())

    def _some_rows(self) -> Iterator[Tensor]:
        """Yield the teacher's outputs (M, D) of some tokens, the same whatever the number of ranks."""
        every = -(-sum(self.splits.train.lengths) // _SAMPLED_TOKENS)
        for half in (0, 1):
            for hidden, mask in self.splits.train.teacher_batches(self.device, half):
                yield from (self._viewed(rows[kept][::every]) for rows, kept in zip(hidden, mask, strict=True))

    def _viewed(self, hidden: Tensor) -> Tensor:
        """Return the teacher's outputs (M, W) as the objective reads them."""
        return self.current.objective.view(self.current.block.hidden_states(hidden), self._teachers_head())

    def _teachers_head(self) -> Head | None:
        return None if self.current.head is None else self.current.head.teacher()

    def _check_finite(self, which: str, streams: list[Tensor]) -> None:
        broken = sum(not bool(sequence.isfinite().all()) for stream in streams for sequence in stream)
        if self.ranks.total(broken) != [0]:
            raise UserError(
                f"block {self.current.plan.index}: its {which} activations hold NaN or infinity; the model overflows "
                f"in {self.trainer.precision}, or its weights are broken; try trainer.precision 32-true."
            )
