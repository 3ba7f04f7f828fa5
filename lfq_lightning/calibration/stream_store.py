"""StreamStore: where activation streams live: on the device, in host memory, or in files of the output folder."""

import logging
import os
import uuid
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import STREAM

log = logging.getLogger(__name__)


class StreamStore:
    """Gives memory to named tensors, the fastest kind first, as far as the budgets reach.

    A file is mapped into memory, so the system pages it in and out; it has no name on disk, and vanishes with the
    process however that ends.

    Args:
        device: where blocks run.
        folder: on whose disk files lie.
        device_bytes: for tensors on the device, if that is not the CPU.
        host_bytes: for tensors in host memory.
    """

    def __init__(self, device: torch.device, folder: Path, device_bytes: int, host_bytes: int) -> None:
        self.device = device
        self.folder = folder
        self._budgets = {"device": device_bytes if device.type != "cpu" else 0, "host": host_bytes}
        self._held: dict[str, tuple[str, int]] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor, in place of an earlier one of that name, which the caller has released."""
        self.release(name)
        needed = prod(shape) * dtype.itemsize
        kind = next((kind for kind, budget in self._budgets.items() if self._used(kind) + needed <= budget), "disk")
        self._held[name] = (kind, needed)
        if kind == "disk":
            log.info("activations: %s, %.2f GB, in a file below %s", name, needed / 1e9, self.folder)
            return self._mapped(self.folder / f"{name}.{uuid.uuid4().hex}{STREAM}", shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device if kind == "device" else "cpu")

    def release(self, name: str) -> None:
        """Give the budget of a tensor back; the caller releases the tensor."""
        self._held.pop(name, None)

    def _mapped(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            with file.open("wb") as opened:  # all of it now: a full disk would end the process when it is written to
                os.posix_fallocate(opened.fileno(), 0, max(1, prod(shape) * dtype.itemsize))
            return torch.from_file(str(file), shared=True, size=prod(shape), dtype=dtype).view(shape)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"activations: {file} cannot be written ({one_line(error)}); free some space, raise data.host_gb, or "
                "lower data.num_samples or seq_len."
            ) from error
        finally:
            file.unlink(missing_ok=True)

    @property
    def reads_ahead(self) -> bool:
        """Reading takes a while, so the next batch is better read while this one is worked on."""
        return self.device.type != "cpu" or any(kind == "disk" for kind, _ in self._held.values())

    def _used(self, kind: str) -> int:
        return sum(size for where, size in self._held.values() if where == kind)
