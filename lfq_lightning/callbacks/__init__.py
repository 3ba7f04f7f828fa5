"""Callbacks: one file each. `CALLBACKS` knows them by name."""

from lightning.pytorch import Callback

from lfq_lightning.callbacks.block_callback import BlockCallback, BlockReport
from lfq_lightning.registry import Registry

CALLBACKS: Registry[Callback] = Registry("callback", Callback)

__all__ = ["CALLBACKS", "BlockCallback", "BlockReport"]
