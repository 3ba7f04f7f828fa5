"""The memory of this process."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

_LINUX = Path("/proc/self")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of containers


def reset_peak(device: torch.device) -> None:
    """Start counting anew: on a CUDA device, or on the host, where Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        return_freed_memory()
        (_LINUX / "clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held, in bytes: on a CUDA device, or resident on the host; since `reset_peak`, where the
    system can tell that."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Return how much memory this process holds; its peak so far where the system says no more."""
    return _status("VmRSS") if sys.platform == "linux" else peak_bytes(torch.device("cpu"))


def _status(name: str) -> int:
    lines = dict(line.split(":") for line in (_LINUX / "status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def host_bytes() -> int:
    """Return how much memory this machine has, or its container may take."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _LIMITS:
        if file.is_file() and (text := file.read_text().strip()).isdigit():  # `max` is none
            found.append(int(text))
    return min(found)


def return_freed_memory() -> None:
    """Give freed memory back to the system, where glibc would keep it: repacking leaves many holes."""
    if sys.platform == "linux":
        try:
            trim = ctypes.CDLL(None).malloc_trim
        except AttributeError:  # another libc, which has its own ways
            return
        trim(0)
