"""Quantise what is outside the blocks: embeddings and head."""

import torch

from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import ClosedFormQuantizer
from lfq_lightning.stages import LayerPlan


@torch.no_grad()
def solve_outer(checkpoint: Checkpoint, layers: dict[str, LayerPlan]) -> dict[str, QuantizedTensor]:
    """Return the codes of embeddings and head, by full name; their quantizers are data-free."""
    found: dict[str, QuantizedTensor] = {}
    for name, layer in layers.items():
        weight = checkpoint.tensors([f"{name}.weight"])[f"{name}.weight"].float()
        quantizer = layer.closed_form.build(weight, layer.scheme.fitted(weight), checkpoint.dtype)
        assert isinstance(quantizer, ClosedFormQuantizer), "the plan has been checked"
        quantizer.solve()
        found[name] = quantizer.export()
    return found
