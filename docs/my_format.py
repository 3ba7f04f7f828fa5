"""Codes as they are, one 32-bit integer each: a packed format of one's own."""

import torch

from lfq_lightning.formats import FORMATS, PackFormat
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.quantized_tensor import QuantizedTensor


@FORMATS.register
class PlainCodes(PackFormat):
    """Every scheme, in four bytes a weight: easy to read, and larger than the model it came from."""

    paper = "an example"
    quant_method = "plain-codes"
    scale_name = "scales"

    def check(self, name, scheme, shape):
        """Every scheme fits."""

    def layout(self, scheme, shape):
        groups = (shape[0], shape[1] // scheme.group_of(shape[1]))
        return {"codes": shape, "scales": groups, "zeros": groups}

    def pack(self, name, quantized):
        return {
            f"{name}.codes": quantized.codes.to(torch.int32),
            f"{name}.scales": quantized.scale[:, :, 0].contiguous(),
            f"{name}.zeros": quantized.zero_point[:, :, 0].to(torch.int32),
        }

    def unpack(self, name, tensors, scheme):
        codes, scales, zeros = (tensors[f"{name}.{last}"] for last in ("codes", "scales", "zeros"))
        return QuantizedTensor(codes.to(torch.uint8), scales[:, :, None], zeros[:, :, None].to(torch.uint8), scheme)

    def config(self, schemes, dense):
        layers = {name: [scheme.num_bits, scheme.group_size, scheme.symmetric] for name, scheme in schemes.items()}
        return {"quant_method": self.quant_method, "layers": layers}

    def schemes(self, config, layers):
        return {name: IntegerGrid(*config["layers"][name]) for name in layers}

    def engines(self, schemes):
        return []
