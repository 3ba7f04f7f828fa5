"""Leave a layer alone."""

from torch import Tensor

from lfq_lightning.quantizers import QUANTIZERS, DenseQuantizer


@QUANTIZERS.register
class FP(DenseQuantizer):
    """Full precision: the layer stays as it is, by a rule instead of by the lack of one."""

    paper = "the upper bound of every table"

    def export(self) -> Tensor:
        return self.weight
