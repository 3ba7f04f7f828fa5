"""Leave a layer alone."""

from typing import Any

from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.grids import Grid, IntegerGrid
from lfq_lightning.quantizers import QUANTIZERS, DenseQuantizer


@QUANTIZERS.register
class FP(DenseQuantizer):
    """Full precision: the layer stays as it is, by a rule instead of by the lack of one."""

    paper = "the upper bound of every table"

    @classmethod
    def check(cls, scheme: Grid, options: dict[str, Any]) -> None:
        if scheme != IntegerGrid():
            raise UserError("quantizer fp: it leaves the weight as it is; omit bits, group_size, symmetric and grid.")

    def export(self) -> Tensor:
        return self.weight
