"""Read the peak memory of this process."""

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """Return the most memory ever held: allocated on a CUDA device, else resident on the host, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
