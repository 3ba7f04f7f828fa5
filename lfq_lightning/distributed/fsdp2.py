"""FSDP2: the strategy of several processes: each block's parameters, gradients and optimizer state are sharded."""

import atexit
import os
from datetime import timedelta
from typing import final

import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from lfq_lightning.errors import UserError


@final
class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with all ranks, of all nodes, in one group that shards a block."""

    def __init__(self) -> None:
        super().__init__(timeout=timedelta(hours=12))  # the others wait while the first reads, or makes, the data

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's own default is the nodes alone
        self._tensor_parallel_size = 1
        super().setup_environment()

    def disconnect_at_exit(self) -> None:
        """End the connection of the ranks before Python ends: with gloo's threads still alive it may abort.

        Not at once: a process cannot connect twice, and a later run in it goes on with the connection there is.
        """
        atexit.register(_disconnect)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


StrategyRegistry.register("fsdp2", FSDP2, description="fully sharded data parallel, per block")


def launched() -> tuple[int, int] | None:
    """Return devices per node and nodes, as torchrun or srun have started this process; None if neither has.

    Raises UserError if nodes have different numbers of processes.
    """
    if TorchElasticEnvironment.detect():
        world, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        world = int(os.environ["SLURM_NTASKS"])
        nodes = int(os.environ["SLURM_NNODES"])
        if world % nodes:
            raise UserError(f"{world} processes do not divide among {nodes} nodes; start equally many on each node.")
        here = world // nodes
    else:
        return None
    if world % here:
        raise UserError(f"{world} processes do not divide into nodes of {here}; start equally many on each node.")
    return here, world // here
