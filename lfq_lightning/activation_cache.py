"""ActivationCache: the two streams of hidden states that run through the blocks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lfq_lightning.token_set import TokenSet

Batch = dict[str, Any]  # inputs (B, T, D), target {name: (B, T, …)}, mask (B, T)

FORWARD_BATCH = 8  # sequences per forward when nothing is trained


class ActivationCache(Dataset[Batch]):
    """Hidden states of one split, before the current block: the teacher's and the student's, in CPU memory.

    The teacher stream holds what the full-precision model sees; once the teacher has run it holds the block's
    full-precision outputs, which are both the objective's target and the next block's inputs. The student stream holds
    what the quantised prefix gives. Beside these two streams of N·T·D values there is only what the block's objective
    keeps of the teacher (`logit_ce`: D fp32 numbers a token).

    Args:
        embeddings: (N, T, D), the first block's inputs, in the dtype of both streams.
        tokens: what they were made from.
    """

    def __init__(self, embeddings: Tensor, tokens: TokenSet) -> None:
        self.teacher = embeddings
        self.student = embeddings.clone()
        self.mask = tokens.mask
        self.next_token = tokens.next_token
        self.target: dict[str, Tensor] = {}
        self.reference = self.teacher[:0]

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        target = {name: value[indices] for name, value in self.target.items()}
        target |= {"hidden": self.teacher[indices], "next_token": self.next_token[indices]}
        return {"inputs": self.student[indices], "target": target, "mask": self.mask[indices]}

    def student_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the student's inputs (B, T, D) and masks (B, T) in order."""
        return self._batches(self.student, device)

    def reference_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the teacher's inputs (B, T, D), if they were kept, and masks (B, T) in order."""
        return self._batches(self.reference, device)

    def advance_teacher(self, block: Callable[[Tensor], Tensor], device: torch.device, keep: bool = False) -> None:
        """Replace the teacher's inputs by the block's outputs, in place; `keep` a copy of the inputs as `reference`."""
        self.reference = self.teacher.clone() if keep else self.teacher[:0]
        _advance(self.teacher, block, device)

    def advance_student(self, block: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Replace the student's inputs by the block's outputs, in place."""
        _advance(self.student, block, device)

    def set_target(self, make: Callable[[Tensor], dict[str, Tensor]], device: torch.device) -> None:
        """Cache what `make` keeps of the teacher's outputs; it maps (M, D) to tensors with M rows. Pads become 0."""
        parts: list[dict[str, Tensor]] = []
        for hidden, mask in zip(self.teacher.split(FORWARD_BATCH), self.mask.split(FORWARD_BATCH), strict=True):
            rows = make(hidden.to(device)[mask.to(device)])
            parts.append({name: _scatter(value.cpu(), mask) for name, value in rows.items()})
        self.target = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def in_order(self, batch_size: int) -> "DataLoader[Batch]":
        """Return a loader over all sequences, for validation."""
        return DataLoader(self, batch_size=batch_size, collate_fn=_identity)

    def shuffled(self, batch_size: int, num_batches: int, seed: int) -> "DataLoader[Batch]":
        """Return a loader of exactly `num_batches` batches: as many seeded permutations as that takes."""
        generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(self, num_samples=batch_size * num_batches, generator=generator)
        return DataLoader(self, batch_size=batch_size, sampler=sampler, collate_fn=_identity)

    def _batches(self, stream: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, mask in zip(stream.split(FORWARD_BATCH), self.mask.split(FORWARD_BATCH), strict=True):
            yield inputs.to(device), mask.to(device)


@dataclass(frozen=True)
class Splits:
    """The two caches of a run."""

    train: ActivationCache
    held_out: ActivationCache

    def each(self) -> tuple[ActivationCache, ActivationCache]:
        return self.train, self.held_out


def _advance(stream: Tensor, block: Callable[[Tensor], Tensor], device: torch.device) -> None:
    for inputs in stream.split(FORWARD_BATCH):  # views: writing to them writes the stream
        inputs.copy_(block(inputs.to(device)))


def _scatter(rows: Tensor, mask: Tensor) -> Tensor:
    full = torch.zeros(*mask.shape, *rows.shape[1:], dtype=rows.dtype)
    full[mask] = rows
    return full


def _identity(batch: Any) -> Any:
    return batch
