"""Leave a layer alone."""

from typing import Any

from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantizers import QUANTIZERS, DenseQuantizer


@QUANTIZERS.register
class FP(DenseQuantizer):
    """Full precision: the layer stays as it is, by a rule instead of by the lack of one."""

    paper = "the upper bound of every table"

    @classmethod
    def check(cls, scheme: QuantScheme, options: dict[str, Any]) -> None:
        if scheme != QuantScheme():
            raise UserError("quantizer fp: it leaves the weight as it is; omit bits, group_size and symmetric.")

    def export(self) -> Tensor:
        return self.weight
