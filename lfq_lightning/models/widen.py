"""Let a model whose weights have 16 bits multiply in fp32, on a CPU that is slow in 16 bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfq_lightning.peak_memory import host_bytes
from lfq_lightning.precision import product_dtype

_TILE_WEIGHTS = 2**20  # turned to fp32 at a time: they stay in the cache until they are multiplied


class WideLinear(nn.Module):
    """y = x Wᵀ + b in fp32; W (O, I) keeps its 16 bits in memory and is widened, a few rows at a time, in each call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = max(1, _TILE_WEIGHTS // self.in_features)
        x = x.float()
        product = torch.cat([F.linear(x, part.float()) for part in self.weight.split(rows)], -1)
        return product if self.bias is None else product + self.bias


def has_room(size: int) -> bool:
    """Tell whether weights may become `size` bytes for good: at most half of the machine's memory."""
    return size <= host_bytes() // 2


def widen(model: nn.Module) -> None:
    """Let `model`, on its device, multiply in `product_dtype`; in place, and nothing where that is its weights' own.

    Weights become fp32 if there is room. Otherwise those of linear layers and
    embeddings stay as they are, and are widened in each call.
    """
    narrow = [p for p in model.parameters() if p.is_floating_point() and product_dtype(p.dtype, p.device) != p.dtype]
    kept: set[Tensor] = set()
    if not has_room(sum(4 * parameter.numel() for parameter in narrow)):
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                model.set_submodule(name, WideLinear(module))
                kept.add(module.weight)
            elif isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda _module, _arguments, found: found.float())
                kept.add(module.weight)
    for parameter in narrow:
        if parameter not in kept:
            parameter.data = parameter.data.float()
