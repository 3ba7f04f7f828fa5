"""PackedLinear: a linear layer whose weight stays packed in memory."""

from torch import Tensor, nn

from lfq_lightning.bitstream import pack
from lfq_lightning.ops.packed_matmul import cpu_int4
from lfq_lightning.ops.packed_matmul.reference import packed_matmul
from lfq_lightning.quantized_tensor import QuantizedTensor


class PackedLinear(nn.Module):
    """y = x Ŵᵀ + b, frozen, in the dtype of the scales.

    On a CPU, weights of up to 4 bits with bf16 scales go through PyTorch's int4 kernel (2- and 3-bit codes take 4 bits
    of memory there); all others are dequantised tile by tile in each call.

    Args:
        quantized: the weight (O, I).
        bias: (O,), or None.
    """

    packed: Tensor
    scale: Tensor
    scale_and_zero: Tensor
    zero_point: Tensor

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.codes.shape
        self.scheme = quantized.scheme
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.int4 = cpu_int4.fits(quantized)
        if self.int4:
            weight = cpu_int4.int4_weight(quantized)
            self.register_buffer("packed", weight.packed, persistent=False)
            self.register_buffer("scale_and_zero", weight.scale_and_zero, persistent=False)
        else:
            self.register_buffer("packed", pack(quantized.codes, quantized.scheme.num_bits), persistent=False)
            self.register_buffer("scale", quantized.scale, persistent=False)
        self.register_buffer("zero_point", quantized.zero_point, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.int4:
            weight = cpu_int4.Int4Weight(self.packed, self.scale_and_zero, self.zero_point, self.out_features)
            product = cpu_int4.int4_matmul(rows, weight)
        else:
            product = packed_matmul(rows, self.packed, self.scale, self.zero_point, self.scheme)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        kernel = "int4 kernel" if self.int4 else "dequantised"
        return f"{self.in_features} → {self.out_features}, {self.scheme}, {kernel}"
