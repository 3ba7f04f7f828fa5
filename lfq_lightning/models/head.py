"""Head: the frozen final norm and LM head as one linear map of the normed hidden state."""

import copy
from functools import cached_property

import torch
from torch import Tensor, nn

from lfq_lightning.ops.gram import add_gram
from lfq_lightning.ops.logit_divergence import soft_cap

_GRAM_ROWS = 2**14  # rows of the head turned to fp32 at once


class Tail(nn.Module):
    """What a model does between its last block and its head where that is more than a norm: (…, W) → (…, D).

    Args:
        parts: modules that take hidden states (B, T, …), one after the other.
        shape: of a token's hidden states; W is its product.
    """

    def __init__(self, parts: list[nn.Module], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.shape = shape

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(1, -1, *self.shape)
        for part in self.parts:
            rows = part(rows)
        return rows.reshape(*hidden.shape[:-1], rows.shape[-1])


class Head(nn.Module):
    """Frozen readout: logits = weight @ readout(hidden), soft-capped where the model does so.

    Args:
        norm: the model's final norm, (…, D) → (…, D).
        weight: (V, D), the LM head in the dtype its products should run in. Never changed: it may be the embedding.
        bias: (V,) or None; kept as one more column of the weight, so that z = W h holds as it stands.
        logit_scale: factor on the logits; kept on the hidden state.
        softcap: bound c on the logits, c·tanh(z / c); None without one.
        width: columns of hidden states that `norm` reads; D if not said.
        shipped: (V, D), the head that ships, if it is quantised. One weight then serves both, [weight, shipped]: the
            teacher's rows stand before zeros (`teacher().readout`), the student's behind (`readout`), and any loss of
            logits z = W h is that of the two heads.
    """

    def __init__(
        self,
        norm: nn.Module,
        weight: Tensor,
        bias: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        width: int | None = None,
        shipped: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm.requires_grad_(False)
        self.width = width or weight.shape[1]
        self.has_bias = bias is not None
        if bias is not None:
            column = bias[:, None].to(weight.dtype) / logit_scale
            weight = torch.cat([weight, column], 1)
            shipped = None if shipped is None else torch.cat([shipped, column], 1)
        self.side = None if shipped is None else 1
        if shipped is not None:
            weight = torch.cat([weight, shipped], 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.logit_scale = logit_scale
        self.softcap = softcap

    def teacher(self) -> "Head":
        """Return the head that makes the teacher's rows; itself if one head serves both."""
        if self.side is None:
            return self
        twin = copy.copy(self)
        twin.side = 0
        return twin

    def logits(self, readout: Tensor) -> Tensor:
        """Return the model's logits (…, V) of hidden states that went through `readout`."""
        return soft_cap(readout.to(self.weight) @ self.weight.T, self.softcap)

    @cached_property
    def gram(self) -> Tensor:
        """WᵀW (D, D) in fp32 or wider: the inner product of hidden states that is that of their logits."""
        sums = torch.promote_types(self.weight.dtype, torch.float32)
        width = self.weight.shape[1]
        gram = torch.zeros(width, width, dtype=sums, device=self.weight.device)
        with torch.no_grad():
            for rows in self.weight.split(_GRAM_ROWS):
                add_gram(gram, rows)
        return gram

    def normed(self, hidden: Tensor) -> Tensor:
        """Return what enters the LM head, (…, D), from hidden states before the final norm; further columns go."""
        return self.norm(hidden[..., : self.width])

    def readout(self, hidden: Tensor) -> Tensor:
        """Return h with z = weight @ h, from hidden states before the final norm: (…, D) → (…, D or D + 1).

        Twice as many columns, half of them 0, where another head ships.

        Columns behind D, which travel with hidden states, are left out.
        """
        h = self.normed(hidden)
        if self.has_bias:
            h = torch.cat([h, torch.ones_like(h[..., :1])], dim=-1)
        if self.logit_scale != 1.0:
            h = h * self.logit_scale
        if self.side is None:
            return h
        nothing = torch.zeros_like(h)
        return torch.cat([nothing, h] if self.side else [h, nothing], dim=-1)
