"""What closed-form quantizers share that only find a grid: the weight itself rounds to nearest on it."""

from torch import Tensor

from lfq_lightning.grids.round_to_nearest import round_to_nearest
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers.quantizer import ClosedFormQuantizer


class NearestQuantizer(ClosedFormQuantizer):
    """Base of quantizers whose `solve` sets `scale` and `zero_point` (O, G, 1) as `search_scale` returns them."""

    scale: Tensor
    zero_point: Tensor

    @property
    def latent(self) -> Tensor:
        return self.weight

    def export(self) -> QuantizedTensor:
        codes = round_to_nearest(self.weight, self.scale, self.zero_point, self.scheme)
        return self.quantized(codes, self.scale, self.zero_point)
