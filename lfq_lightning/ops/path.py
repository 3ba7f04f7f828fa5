"""Which way an operation takes: by the tensor's device, and said in the log."""

import importlib.util
from functools import cache

import torch


def runs_triton(device: torch.device) -> bool:
    """Tell whether operations on this device run as Triton kernels; elsewhere they run as their PyTorch reference.

    The kernels hold NVIDIA's assembly; PyTorch calls AMD's devices `cuda` too. Triton itself is for Linux only.
    """
    return device.type == "cuda" and torch.version.hip is None and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def describe(device: torch.device) -> str:
    """Return which way operations take on `device`, for the log."""
    return "Triton kernels" if runs_triton(device) else "the PyTorch reference"


def best_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
