"""Eight scales and eight minima of six bits in twelve bytes (Q4_K, Q5_K)."""

import torch
from torch import Tensor


def join_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Return whole numbers < 64 (…, 8) each as bytes (…, 12): the last four are split between the other eight and
    four bytes of their own."""
    (first, last), (first_minima, last_minima) = (each.to(torch.uint8).split(4, -1) for each in (scales, minima))
    parts = [first | last >> 4 << 6, first_minima | last_minima >> 4 << 6, last & 15 | last_minima << 4]
    return torch.cat(parts, -1)


def split_six_bits(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `join_six_bits`."""
    first, first_minima, rest = stored.split(4, -1)
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], -1)
    return scales, torch.cat([first_minima & 63, rest >> 4 | first_minima >> 6 << 4], -1)
