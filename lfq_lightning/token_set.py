"""TokenSet: equally long, right-padded token sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_NEXT = -1  # the label where no next token is known


@dataclass(frozen=True)
class TokenSet:
    """Token sequences of one split.

    Args:
        input_ids: int64 (N, T), padded on the right.
        mask: bool (N, T), False at pads.
    """

    input_ids: Tensor
    mask: Tensor

    @classmethod
    def from_lists(cls, sequences: list[list[int]], seq_len: int) -> "TokenSet":
        """Pad sequences of 1 … seq_len tokens. The pad's id does not matter: pads are masked everywhere."""
        input_ids = torch.zeros(len(sequences), seq_len, dtype=torch.int64)
        mask = torch.zeros(len(sequences), seq_len, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = True
        return cls(input_ids, mask)

    @property
    def next_token(self) -> Tensor:
        """The token after each one, int64 (N, T); NO_NEXT at the end of a sequence."""
        following = torch.full_like(self.input_ids, NO_NEXT)
        following[:, :-1] = torch.where(self.mask[:, 1:], self.input_ids[:, 1:], NO_NEXT)
        return following

    def __len__(self) -> int:
        return len(self.input_ids)
