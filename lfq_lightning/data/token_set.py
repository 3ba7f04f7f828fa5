"""TokenSet: equally long, right-padded token sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def __len__(self) -> int:
        return len(self.input_ids)
