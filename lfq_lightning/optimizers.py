"""Optimizers by name, each with the schedule it is used with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

_EPS = 1e-15  # a block's squared error has gradients of 1e-9 a weight, which Adam's usual 1e-8 would smother


class SignSGD(torch.optim.Optimizer):
    """Steps of one size: p ← p - lr·sign(gradient) (signSGD, arXiv 1802.04434, algorithm 1)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
        return loss


# name → learning rate where the user gives none, for this many steps
DEFAULT_LR: dict[str, Callable[[int], float]] = {
    "adam": lambda _: 2e-3,
    "adamw8bit": lambda _: 2e-3,
    "sign_sgd": lambda steps: 1 / steps,
}


def build_optimizer(name: str, groups: list[dict[str, Any]], steps: int, fused: bool) -> dict[str, Any]:
    """Return what a LightningModule's `configure_optimizers` does.

    Args:
        name: `adam` (a cosine to 0); `adamw8bit`, the same with 8-bit states (arXiv 2110.02861), tensors below 4096
            values in 32; or `sign_sgd` (a line to 0, as AutoRound has it, arXiv 2309.05516, section 3.2).
        groups: parameter groups, each with `params` and `lr`.
        steps: length of the schedule.
        fused: let Adam use PyTorch's fused kernel; it does not go with gradient clipping in Lightning.
    """
    if name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, eps=_EPS, fused=fused)
        schedule: Any = CosineAnnealingLR(optimizer, T_max=steps)
    elif name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(groups, eps=_EPS, weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, T_max=steps)
    else:
        optimizer = SignSGD(groups, lr=0.0)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
