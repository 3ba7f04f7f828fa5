"""NF4 through bitsandbytes: a data-free baseline."""

from typing import Any

import torch
from torch import Tensor

from lfq_lightning.errors import UserError, require
from lfq_lightning.grids import Grid, IntegerGrid
from lfq_lightning.quantizers import QUANTIZERS, DenseQuantizer

_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes has kernels for


@QUANTIZERS.register
class NF4(DenseQuantizer):
    """4-bit NormalFloat of bitsandbytes in blocks of `group_size` (64 if -1). A row for tables: it ships dense.

    Its 16 levels are quantiles of a normal distribution, not an integer grid, so the packed format cannot hold them.
    """

    paper = "QLoRA (arXiv 2305.14314), section 3"

    @classmethod
    def check(cls, scheme: Grid, options: dict[str, Any]) -> None:
        require("bitsandbytes", "quantizer nf4")
        if not isinstance(scheme, IntegerGrid):
            raise UserError("quantizer nf4 has levels of its own; omit grid.")
        if scheme.num_bits != 4:
            raise UserError(f"quantizer nf4 has 4 bits, not {scheme.num_bits}; omit bits.")
        if scheme.group_size not in (-1, *_BLOCK_SIZES):
            sizes = ", ".join(map(str, _BLOCK_SIZES))
            raise UserError(f"quantizer nf4: group_size {scheme.group_size} must be one of {sizes}.")

    def export(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        size = 64 if self.scheme.group_size == -1 else self.scheme.group_size
        # One block a row: bitsandbytes' CPU kernel goes wrong where a block crosses the end of a row.
        flat = torch.nn.functional.pad(self.weight.flatten(), (0, -self.weight.numel() % size)).view(-1, size)
        packed, state = quantize_4bit(flat, blocksize=size, quant_type="nf4")
        whole = dequantize_4bit(packed, state).to(torch.float32).flatten()
        return whole[: self.weight.numel()].view_as(self.weight)
