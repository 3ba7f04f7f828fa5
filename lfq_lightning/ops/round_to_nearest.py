"""Round a weight to the nearest level of a grid."""

from torch import Tensor

from lfq_lightning.quant_scheme import QuantScheme


def round_to_nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """Return codes (O, I), whole numbers in fp32, for weight (O, I) fp32, scale and zero point (O, G, 1)."""
    grouped = weight.view(len(weight), scale.shape[1], -1)
    return (grouped / scale.float()).round_().add_(zero_point).clamp_(0, scheme.max_code).view_as(weight)
