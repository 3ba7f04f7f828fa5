"""Sampler: chooses the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lfq_lightning.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """The likeliest token; or, above temperature 0, one drawn from the fewest that hold `top_p` of the probability.

    A draw is the largest of p / e over tokens, each e exponentially distributed. Nothing is read back to the host, and
    random numbers come from PyTorch's generator of the device, so a CUDA graph draws anew each time it is launched.

    Args:
        temperature: of the softmax; 0 is greedy.
        top_p: nucleus sampling (arXiv 1904.09751, section 3.1); 1 is all tokens.

    Raises UserError for a temperature below 0, top_p not in (0, 1], or a top_p that greedy would ignore.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be 0, which is greedy, or positive.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1.")
        if self.top_p < 1 and not self.temperature:
            raise UserError(f"top_p {self.top_p} is for tokens that are drawn; give a temperature too.")

    def __call__(self, logits: Tensor) -> Tensor:
        """Return a token int64 (…, 1) for each row of logits (…, V)."""
        if not self.temperature:
            return logits.argmax(-1, keepdim=True)
        p = (logits.float() / self.temperature).softmax(-1)
        if self.top_p == 1:
            return _drawn(p)
        p, tokens = p.sort(descending=True, stable=True)
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)
        return tokens.gather(-1, _drawn(p))


def _drawn(p: Tensor) -> Tensor:
    return (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
