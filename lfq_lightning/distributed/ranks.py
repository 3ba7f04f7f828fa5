"""Ranks: the processes of a run, and what they tell each other. One process is one rank, and nothing is sent."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lfq_lightning.errors import UserError, one_line

T = TypeVar("T")


class Ranks:
    """All collective operations of a run.

    Args:
        device: of this rank; tensors that are sent lie there.
        mesh: the ranks over which a block is sharded; None in a single process.
    """

    def __init__(self, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        self.device = device
        self.mesh = mesh
        self.size = mesh.size() if mesh is not None else 1
        self.rank = mesh.get_local_rank() if mesh is not None else 0

    @property
    def first(self) -> bool:
        """This is the rank that writes."""
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """Return which of `count` sequences this rank holds: every size-th."""
        return list(range(self.rank, count, self.size))

    def rows(self, count: int, rank: int | None = None) -> slice:
        """Return which of `count` rows a rank solves; this one if not said."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in place and in its own dtype."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def total(self, *values: float) -> list[float]:
        """Return the sum of each value over ranks."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(value) for value in summed]

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """Return all `count` rows of a tensor of which each rank has its `rows`."""
        if self.size == 1:
            return part
        whole = torch.empty(count, *part.shape[1:], dtype=part.dtype, device=part.device)
        for rank in range(self.size):
            rows = whole[self.rows(count, rank)]
            if rank == self.rank:
                rows.copy_(part)
            if rows.numel():
                dist.broadcast(rows.view(torch.uint8), rank)
        return whole

    def interleave(self, mine: list[T]) -> list[T]:
        """Return values of all sequences, in order, of which each rank has those of its `share`."""
        if self.size == 1:
            return mine
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        count = sum(map(len, everyone))
        return [everyone[index % self.size][index // self.size] for index in range(count)]

    def same(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor on all of them."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def once(self, make: Callable[[], T]) -> T:
        """Let the first rank make a value, and return it everywhere, when it is made; what it raises ends all ranks."""
        if self.size == 1:
            return make()
        sent: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.first:
            try:
                sent[0] = make()
            except Exception as error:
                failed, sent[1] = error, one_line(error)
        dist.broadcast_object_list(sent, 0, device=self.device)
        if failed is not None:
            raise failed
        if sent[1] is not None:
            raise UserError(sent[1])
        return sent[0]

    def release(self) -> None:
        """Free modules that were sharded: FSDP2 ties them to themselves, and nothing else would look for them soon."""
        if self.size > 1:
            gc.collect()

    def shard(self, *modules: nn.Module) -> None:
        """Keep of each parameter of the modules a share per rank; it is whole while its module runs (FSDP2).

        Modules come before those that they are parts of. One that is sharded already is left as it is.
        """
        if self.size > 1:
            for module in modules:
                if not isinstance(module, FSDPModule):
                    fully_shard(module, mesh=self.mesh, reshard_after_forward=True)

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Make the parameters of a sharded module whole on every rank, inside."""
        sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for part in sharded:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
        for part in sharded:
            part.reshard()

    def gathered(self, tensor: Tensor) -> Tensor | None:
        """Return all of a tensor of which each rank may hold a share, on the first rank's CPU; None on the others."""
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.detach().cpu() if self.first else None

    def like(self, tensor: Tensor, whole: Tensor) -> Tensor:
        """Return of `whole` what this rank has of `tensor`, on its device."""
        whole = whole.to(tensor.device)
        if isinstance(tensor, DTensor):
            return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
        return whole


def launched_rank() -> int:
    """Return this process's rank as its launcher has told it, before the ranks are connected."""
    return rank_zero_only.rank  # type: ignore[attr-defined]


def ranks_of(trainer: Trainer) -> Ranks:
    """Return the ranks of a running Trainer."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return Ranks(strategy.root_device, strategy.device_mesh["data_parallel"])
    return Ranks(strategy.root_device)
