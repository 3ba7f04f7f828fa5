"""The memory of this process."""

import ctypes
import os
import resource
import sys

import torch


def reset_peak(device: torch.device) -> None:
    """Start counting anew on a CUDA device; the host's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held, in bytes: on a CUDA device since `reset_peak`, else resident on the host, ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def host_bytes() -> int:
    """Return how much memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def return_freed_memory() -> None:
    """Give freed memory back to the system, where glibc would keep it: repacking leaves many holes."""
    if sys.platform == "linux":
        try:
            trim = ctypes.CDLL(None).malloc_trim
        except AttributeError:  # another libc, which has its own ways
            return
        trim(0)
