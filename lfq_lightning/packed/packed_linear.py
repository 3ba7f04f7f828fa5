"""PackedLinear: a linear layer whose weight stays packed in memory."""

import torch
from torch import Tensor, nn

from lfq_lightning.errors import UserError
from lfq_lightning.ops.bitstream import pack
from lfq_lightning.ops.packed_matmul import cpu_int4
from lfq_lightning.ops.packed_matmul.reference import packed_matmul
from lfq_lightning.ops.path import runs_triton
from lfq_lightning.precision import product_dtype
from lfq_lightning.quantized_tensor import QuantizedTensor


class PackedLinear(nn.Module):
    """y = x Ŵᵀ + b, frozen, in the dtype of x, on the device where `quantized` lies.

    On a GPU, weights of 2, 3, 4 and 8 bits go through our Triton kernel; on a CPU, weights in groups of a multiple of
    32 through PyTorch's int4 kernel, at the precision of bf16 (codes of 2 and 3 bits take 4 bits of memory there, wider
    ones 8). All others are dequantised, tile by tile, in each call. Each way has its own layout, so the layer does not
    move between kinds of device.

    Args:
        quantized: the weight (O, I).
        bias: (O,), or None.
    """

    packed: Tensor
    grid: Tensor
    arrivals: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.codes.shape
        self.scheme = quantized.scheme
        self.scale_dtype = quantized.scale.dtype
        self.device_type = quantized.codes.device.type
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.way = _way(quantized)
        buffers: dict[str, Tensor] = {}
        if self.way == "Triton kernel":
            from lfq_lightning.ops.packed_matmul import triton

            tiled = triton.tile(quantized)
            buffers = {"packed": tiled.words, "grid": tiled.grid, "arrivals": tiled.arrivals}
        elif self.way == "int4 kernel":
            self.int4 = cpu_int4.Int4Weight(quantized)
        else:
            packed = pack(quantized.codes, quantized.scheme.num_bits)
            buffers = {"packed": packed, "scale": quantized.scale, "zero_point": quantized.zero_point}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def joined(cls, layers: list["PackedLinear"]) -> "PackedLinear":
        """Return one layer with all outputs of some that go through the Triton kernel and are alike but for these."""
        first, joined = layers[0], cls.__new__(cls)
        nn.Module.__init__(joined)
        for name in ("in_features", "scheme", "scale_dtype", "device_type", "way"):
            setattr(joined, name, getattr(first, name))
        joined.out_features = sum(layer.out_features for layer in layers)
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        joined.register_buffer("packed", torch.cat([layer.packed for layer in layers], dim=2), persistent=False)
        joined.register_buffer("grid", torch.cat([layer.grid for layer in layers], dim=1), persistent=False)
        joined.register_buffer("arrivals", first.arrivals, persistent=False)
        return joined

    def forward(self, x: Tensor) -> Tensor:
        device = next(self.buffers()).device
        if device.type != self.device_type:
            raise UserError(
                f"this model was packed for {self.device_type} and moved to {device.type}; load it there: "
                f"lfq_lightning.load(DIR, device={device.type!r})."
            )
        rows = x.reshape(-1, self.in_features)
        product = self._product(rows).view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def _product(self, rows: Tensor) -> Tensor:
        if self.way == "Triton kernel":
            from lfq_lightning.ops.packed_matmul import triton

            bits, group = self.scheme.num_bits, self.scheme.group_of(self.in_features)
            tiled = triton.TiledWeight(self.packed, self.grid, self.arrivals, self.scale_dtype, bits, group)
            return triton.matmul(rows, tiled)
        if self.way == "int4 kernel":
            return self.int4(rows)
        wide = product_dtype(rows.dtype, rows.device)
        return packed_matmul(rows.to(wide), self.packed, self.scale, self.zero_point, self.scheme).to(rows.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.scheme}, {self.way}"


def _way(quantized: QuantizedTensor) -> str:
    if runs_triton(quantized.codes.device):
        from lfq_lightning.ops.packed_matmul import triton

        return "Triton kernel" if triton.fits(quantized) else "dequantising"
    return "int4 kernel" if cpu_int4.fits(quantized) else "dequantising"
