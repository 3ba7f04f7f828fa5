"""The CPU that a row was measured on, and the time it has worked."""

import os
import platform
import resource
from pathlib import Path

import torch

from lfq_lightning.precision import faster_than_fp32

_CPU_INFO = Path("/proc/cpuinfo")


def cpu() -> str:
    """Return name, cores, PyTorch's instruction set, and which of bf16 and fp32 this CPU multiplies faster."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    fast = "bf16" if faster_than_fp32(torch.bfloat16) else "fp32"
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}, {fast} faster"


def cpu_seconds() -> float:
    """Return the processor time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
