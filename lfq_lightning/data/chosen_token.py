"""ChosenToken: lets transformers' `generate` go on with the token that we choose."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor


class ChosenToken(LogitsProcessor):
    """Leaves only one token of each row, so that greedy decoding takes it.

    Args:
        choose: logits (B, V) → tokens int64 (B, 1).
    """

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter_(1, self.choose(scores), 0.0)
