"""Optimizers by name, each with the schedule it is used with."""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class OptimizerKind:
    """All that is known of an optimizer.

    Args:
        build: (parameter groups, steps of the schedule, fused) → the optimizer and its schedule; `fused` lets Adam use
            PyTorch's fused kernel, which does not go with gradient clipping in Lightning.
        lr: its learning rate where the user gives none, for this many steps.
        state_bytes: of each trained parameter.
        needs: a package that not every machine has.
        shards: its state can be shared out among processes.
    """

    build: Callable[[list[dict[str, Any]], int, bool], tuple[torch.optim.Optimizer, Any]]
    lr: Callable[[int], float]
    state_bytes: int
    needs: str | None = None
    shards: bool = True


def _adam(groups: list[dict[str, Any]], steps: int, fused: bool) -> tuple[torch.optim.Optimizer, Any]:
    """A cosine to 0."""
    optimizer = torch.optim.Adam(groups, eps=_EPS, fused=fused)
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps)


def _adamw8bit(groups: list[dict[str, Any]], steps: int, fused: bool) -> tuple[torch.optim.Optimizer, Any]:
    """The same with 8-bit states (arXiv 2110.02861); tensors below 4096 values in 32."""
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(groups, eps=_EPS, weight_decay=0.0)
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps)


def _sign_sgd(groups: list[dict[str, Any]], steps: int, fused: bool) -> tuple[torch.optim.Optimizer, Any]:
    """A line to 0, as AutoRound has it (arXiv 2309.05516, section 3.2)."""
    optimizer = SignSGD(groups, lr=0.0)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)


OPTIMIZERS = {
    "adam": OptimizerKind(_adam, lr=lambda _: 2e-3, state_bytes=8),
    "adamw8bit": OptimizerKind(_adamw8bit, lr=lambda _: 2e-3, state_bytes=2, needs="bitsandbytes", shards=False),
    "sign_sgd": OptimizerKind(_sign_sgd, lr=lambda steps: 1 / steps, state_bytes=0),
}
