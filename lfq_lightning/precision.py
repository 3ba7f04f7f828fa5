"""The dtype of matrix products: what a Lightning precision means, and which one is fast on the machine at hand."""

import logging
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lfq_lightning.errors import UserError

log = logging.getLogger(__name__)

AUTO = "auto"
_COMPUTE = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SMALL, _LARGE = (256, 256), (1024, 512)  # rows, width of the products that are timed
_HOPELESS = 3.0  # a small product so many times slower than in fp32 decides; a large one may take seconds
_WORTH = 0.8  # of the time in fp32: half precision must be clearly faster
_ROUNDS = 3


def choose_precision(precision: str, accelerator: object, begun: str | None = None) -> str:
    """Return the Lightning precision for `auto`; any other is returned as it is.

    On a GPU that multiplies in bf16 it is `bf16-mixed`. On a CPU it is so only where bf16 products are faster than fp32
    ones, which is timed (flags of the CPU mislead under a hypervisor). Everywhere else it is `32-true`.

    Args:
        precision: as the Trainer takes it, or `auto`.
        accelerator: as the Trainer takes it.
        begun: the precision of the run that this one resumes or reuses, which it keeps.
    """
    if precision != AUTO:
        return precision
    found, reason = _by_device(_device_type(accelerator))
    if begun is not None and begun != found:
        log.info("precision: %s, as the run began; by itself this machine would take %s (%s)", begun, found, reason)
        return begun
    log.info("precision: %s (%s)", found, reason)
    return found


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products under `Trainer(precision=…)`; UserError for one that harms rounding."""
    if precision not in _COMPUTE:
        raise UserError(
            f"trainer.precision: {precision} keeps no fp32 masters for learned rounding; use {AUTO}, "
            f"{', '.join(_COMPUTE)}."
        )
    return _COMPUTE[precision]


def stream_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which hidden states are kept between blocks: fp32, or bf16 where products are bf16."""
    return torch.bfloat16 if compute_dtype(precision) == torch.bfloat16 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype; one of whole numbers, such as a table, as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def product_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a whole model whose weights are `stored` runs: that one, or fp32 on a slow CPU."""
    if device.type != "cpu" or stored.itemsize > 2 or faster_than_fp32(stored):
        return stored
    return torch.float32


@cache
def faster_than_fp32(dtype: torch.dtype) -> bool:
    """Tell whether this CPU multiplies matrices in `dtype`, 16 bits, faster than in fp32. Takes milliseconds, once."""
    return _timed(dtype)[0]


@cache
def _timed(dtype: torch.dtype) -> tuple[bool, str]:
    half, full = _product_seconds(dtype, *_SMALL)
    if half < _HOPELESS * full:
        half, full = _product_seconds(dtype, *_LARGE)
    said = f"a product takes {half * 1e3:.2g} ms in {str(dtype).removeprefix('torch.')}, {full * 1e3:.2g} ms in float32"
    return half < _WORTH * full, said


def _product_seconds(dtype: torch.dtype, rows: int, width: int) -> tuple[float, float]:
    """Return the least time of a product in `dtype`, and of the same in fp32, in turns."""
    x, weight = torch.ones(rows, width), torch.ones(width, width)
    half = x.to(dtype), weight.to(dtype)
    both = lambda: _product(*half), lambda: _product(x, weight)
    seconds = [[seconds_of(product) for product in both] for _ in range(_ROUNDS)]
    least = [min(column) for column in zip(*seconds, strict=True)]
    return least[0], least[1]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _by_device(device_type: str) -> tuple[str, str]:
    """Return a precision for this kind of device, and why."""
    if device_type == "cpu":
        fast, said = _timed(torch.bfloat16)
        return ("bf16-mixed" if fast else "32-true"), said
    if device_type == "mps" or (torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False)):
        return "32-true", f"{device_type} has no fast bf16 products"
    return "bf16-mixed", "on a GPU"


def _device_type(accelerator: object) -> str:
    """Return the kind of device that Lightning takes for an accelerator."""
    if accelerator in ("auto", "gpu"):
        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
        return "cpu" if accelerator == "auto" else "cuda"
    return (
        accelerator if isinstance(accelerator, str) else type(accelerator).__name__.lower().removesuffix("accelerator")
    )
