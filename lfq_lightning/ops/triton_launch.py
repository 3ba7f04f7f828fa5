"""How every kernel is launched."""

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel on `device`, which need not be the current one.

    A product and a sum may fuse; said here, since Triton's default is about to change.
    """
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)
