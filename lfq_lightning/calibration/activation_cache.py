"""ActivationCache: the two streams of hidden states that run through the blocks."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lfq_lightning.calibration.prefetch import prefetch
from lfq_lightning.calibration.stream_store import StreamStore
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.token_set import TokenSet

TOKENS_AT_ONCE = 2048  # in a forward when nothing is trained: below 1024 a CPU's bf16 products take twice as long

Batch = dict[str, Any]  # inputs (B, T, D), target {name: (B, T, …)}, mask, kept, weight: see `ActivationCache.batch`


class ActivationCache:
    """Hidden states of one split, before the current block: the teacher's and the student's.

    The teacher stream holds what the full-precision model sees; once the teacher has run it holds the block's
    full-precision outputs, which are both the objective's target and the next block's inputs. The student stream holds
    what the quantised prefix gives. Beside these two streams of N·T·D values there is only what the block's objective
    keeps of the teacher (`logit_ce`: D fp32 numbers a token).

    Each rank holds the sequences of its `share`. Everything but training runs over the even sequences and then over the
    odd ones, some at a time: the same ones together in one process and in two, so that the numbers are the same too.

    Args:
        name: of the split.
        embeddings: yields the first block's inputs (1, T, D) of this rank's sequences, in the dtype of both streams;
            what travels with the hidden states to the block is in columns behind D.
        width: D.
        tokens: of all sequences.
        ranks: who holds the others.
        store: where streams live.
    """

    def __init__(
        self, name: str, embeddings: Iterator[Tensor], width: int, tokens: TokenSet, ranks: Ranks, store: StreamStore
    ) -> None:
        self.name = name
        self.width = width
        self.ranks = ranks
        self.store = store
        mine = ranks.share(len(tokens))
        self.mask = tokens.mask[mine]
        self.next_token = tokens.next_token[mine]
        self.lengths = tokens.mask.sum(1).tolist()  # of all sequences, this rank's and others'
        for index, rows in enumerate(embeddings):
            if index == 0:
                shape = (len(mine), *rows.shape[1:])
                self.teacher = store.empty(f"{name}.teacher", shape, rows.dtype)
                self.student = store.empty(f"{name}.student", shape, rows.dtype)
            self.teacher[index] = rows[0]
        self.student.copy_(self.teacher)
        self.target: dict[str, Tensor] = {}
        self.reference = self.teacher[:0]

    def __len__(self) -> int:
        """Return the number of sequences, on all ranks together."""
        return len(self.lengths)

    def batch(self, indices: list[int]) -> Batch:
        """Return this rank's part of a batch of sequences, which are numbered over all ranks.

        `mask` (B, T) is False at pads; `kept` (M,) int64 are the places of all other tokens among B·T.
        `weight` is this rank's share of the batch's tokens times the number of ranks: with it, the mean over ranks of
        each rank's mean over tokens is the mean over the batch's tokens.
        """
        size = self.ranks.size
        mine = [index for index in indices if index % size == self.ranks.rank]
        local = torch.tensor([index // size for index in mine], dtype=torch.int64)
        target = {name: _rows(value, local) for name, value in self.target.items()}
        hidden = _rows(self.teacher, local)[..., : self.width]
        target |= {"hidden": hidden, "next_token": self.next_token[local]}
        tokens, all_tokens = (sum(self.lengths[index] for index in some) for some in (mine, indices))
        mask = self.mask[local]
        return {
            "inputs": _rows(self.student, local),
            "target": target,
            "mask": mask,
            "kept": mask.flatten().nonzero()[:, 0],
            "weight": tokens * size / all_tokens,
        }

    def student_batches(self, device: torch.device, half: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the student's inputs (B, T, D) and masks (B, T) of this rank's even (0) or odd (1) sequences."""
        return self._moved(self.student, device, half)

    def reference_batches(self, device: torch.device, half: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the teacher's inputs (B, T, D), if they were kept, and masks (B, T), likewise."""
        return self._moved(self.reference, device, half)

    def teacher_batches(self, device: torch.device, half: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the teacher's stream (B, T, D) as it stands, and masks (B, T), likewise."""
        return self._moved(self.teacher, device, half)

    def masks(self) -> list[Tensor]:
        """Return the masks (B, T) of the batches in which a stream is advanced, in their order."""
        return [mask for half in (0, 1) for mask in self._some(self.mask, half)]

    def advance_teacher(self, block: Callable[[Tensor], Tensor], device: torch.device, keep: bool = False) -> None:
        """Replace the teacher's inputs by the block's outputs, in place; `keep` a copy of the inputs as `reference`."""
        self.reference = self.teacher[:0]
        if keep:
            self.reference = self.store.empty(f"{self.name}.reference", self.teacher.shape, self.teacher.dtype)
            self.reference.copy_(self.teacher)
        self.teacher = self._advance("teacher", self.teacher, block, device)

    def advance_student(self, block: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Replace the student's inputs by the block's outputs, in place."""
        self.student = self._advance("student", self.student, block, device)

    def restart_student(self, embeddings: Iterator[Tensor]) -> None:
        """Replace the student's inputs by the first block's (1, T, D), as they were at the beginning."""
        for index, rows in enumerate(embeddings):
            if index == 0:
                self.student = self._wide(f"{self.name}.student", self.student, rows)
            self.student[index] = rows[0]

    def set_target(self, make: Callable[[Tensor], dict[str, Tensor]], device: torch.device) -> None:
        """Keep what `make` keeps of the teacher's outputs; it maps (M, D) to tensors with M rows. Pads become 0."""
        for name in self.target:
            self.store.release(f"{self.name}.target.{name}")
        self.target = {}
        for half in (0, 1):
            for number, (hidden, mask) in enumerate(self._moved(self.teacher, device, half)):
                for name, rows in make(hidden[mask]).items():
                    if name not in self.target:
                        shape = (*self.mask.shape, *rows.shape[1:])
                        self.target[name] = self.store.empty(f"{self.name}.target.{name}", shape, rows.dtype).zero_()
                    where = self._some(self.target[name], half)[number]
                    where[mask.to(where.device)] = rows.to(where.device)

    def in_order(self, batch_size: int) -> "BatchLoader":
        """Return a loader over all sequences, for validation."""
        batch_size = self._shared_out(batch_size)
        everything = list(range(len(self)))
        return BatchLoader(self, [everything[i : i + batch_size] for i in range(0, len(self), batch_size)])

    def shuffled(self, batch_size: int, num_batches: int, seed: int, skip: int = 0) -> "BatchLoader":
        """Return a loader of `num_batches` random batches, the first `skip` of them left out.

        Sequences fall into gcd(N, batch_size) classes by their number, and a batch takes equally many of each class, in
        a seeded permutation of it: any number of ranks that divides both has its share of every batch at home, and the
        batches are the same for all of them.
        """
        batch_size = self._shared_out(batch_size)
        generator = torch.Generator().manual_seed(seed)
        classes = math.gcd(len(self), batch_size)
        each = batch_size // classes
        queues: list[list[int]] = [[] for _ in range(classes)]
        batches = []
        for _ in range(num_batches):
            batch: list[int] = []
            for number, waiting in enumerate(queues):
                while len(waiting) < each:
                    drawn = torch.randperm(len(self) // classes, generator=generator) * classes + number
                    waiting.extend(drawn.tolist())
                batch += waiting[:each]
                del waiting[:each]
            batches.append(batch)
        return BatchLoader(self, batches[skip:])

    def _shared_out(self, batch_size: int) -> int:
        """Return the nearest batch size that gives each rank a sequence; preflight has checked those that matter."""
        size = self.ranks.size
        return max(size, batch_size // size * size)

    def _some(self, stream: Tensor, half: int) -> tuple[Tensor, ...]:
        """Return views of this rank's even or odd sequences, some at a time; writing to them writes the stream."""
        rank, size = self.ranks.rank, self.ranks.size
        first = (half - rank) % 2  # of an even number of ranks, each has only even ones, or only odd ones
        mine = stream[first::2] if size % 2 else stream[first * len(stream) :]
        return mine.split(max(1, TOKENS_AT_ONCE // stream.shape[1])) if len(mine) else ()

    def _moved(self, stream: Tensor, device: torch.device, half: int) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, mask in zip(self._some(stream, half), self._some(self.mask, half), strict=True):
            yield inputs.to(device), mask.to(device)

    def _advance(self, which: str, stream: Tensor, block: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """Return the block's outputs in place of its inputs; another tensor if more, or less, travels behind it."""
        made: Tensor | None = None
        for half in (0, 1):
            places: tuple[Tensor, ...] = ()
            for number, inputs in enumerate(self._some(stream, half)):
                outputs = block(inputs.to(device))
                if made is None:
                    made = self._wide(f"{self.name}.{which}", stream, outputs)
                places = places or self._some(made, half)
                places[number].copy_(outputs)
        return stream if made is None else made

    def _wide(self, name: str, stream: Tensor, rows: Tensor) -> Tensor:
        """Return the stream if its rows are as wide as these (B, T, W), else an empty one that is."""
        if stream.shape[-1] == rows.shape[-1]:
            return stream
        return self.store.empty(name, (*stream.shape[:-1], rows.shape[-1]), stream.dtype)


class BatchLoader:
    """What a Trainer iterates over: this rank's part of each batch.

    Args:
        cache: where they come from.
        batches: the sequences of each, numbered over all ranks.
    """

    def __init__(self, cache: ActivationCache, batches: list[list[int]]) -> None:
        self.cache = cache
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        made = (self.cache.batch(indices) for indices in self.batches)
        if self.cache.store.device.type == "cuda":
            made = (apply_to_collection(batch, Tensor, _pinned) for batch in made)
        return prefetch(made) if self.cache.store.reads_ahead else made


def _pinned(tensor: Tensor) -> Tensor:
    """Return it in memory from which a GPU copies without letting the host wait."""
    return tensor if tensor.is_cuda else tensor.contiguous().pin_memory()


def _rows(stream: Tensor, sequences: Tensor) -> Tensor:
    """Return some sequences of a stream, wherever that lies; the host does not wait."""
    return stream.index_select(0, sequences.to(stream.device, non_blocking=True))


@dataclass(frozen=True)
class Splits:
    """The two caches of a run."""

    train: ActivationCache
    held_out: ActivationCache

    def each(self) -> tuple[ActivationCache, ActivationCache]:
        return self.train, self.held_out
