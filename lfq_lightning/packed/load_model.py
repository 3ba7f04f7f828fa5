"""Load a packed model as a transformers model."""

import logging
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lfq_lightning.models.checkpoints.checkpoint import read_generation_config, read_tokenizer
from lfq_lightning.models.meta_model import assign_weights, meta_model
from lfq_lightning.models.widen import widen
from lfq_lightning.packed.merge_layers import merge_layers
from lfq_lightning.packed.packed_folder import PackedFolder
from lfq_lightning.packed.packed_linear import PackedLinear
from lfq_lightning.peak_memory import return_freed_memory
from lfq_lightning.precision import product_dtype

log = logging.getLogger(__name__)


def load(
    folder: str | Path, dequantize: bool = False, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a packed folder and its tokenizer; any format in `lfq list`.

    What is not packed is in the dtype that ships, or in fp32 on a CPU that multiplies faster so (`product_dtype`).

    Its linear layers stay packed (PackedLinear); with `dequantize` they are dense, bit for bit the weights that ship,
    but for named grids' in a model of 16 bits, which are rounded to it.
    On a GPU (`device="cuda"`) packed layers run as Triton kernels.

    Raises UserError if the folder is no packed model, or its files are damaged.
    """
    packed = PackedFolder(folder)
    for name in packed.changed:
        log.warning("%s: %s is not what was written beside the weights", packed.path, name)
    generation, tokenizer = read_generation_config(packed.path), read_tokenizer(packed.path)
    ways: Counter[str] = Counter()
    model = meta_model(packed.config, packed.path)
    weights: dict[str, Tensor] = {}
    for shard in packed.shards():
        # a copy in any case: it releases the mapped file
        own = [name for name in shard.dense if not packed.family.is_extra(name)]
        dense = {name: shard.dense[name].to(device, copy=True) for name in own}
        for name, quantized in shard.layers.items():
            here = quantized.to(device)
            if dequantize or isinstance(model.get_submodule(name), nn.Embedding):
                stored = model.get_parameter(f"{name}.weight").dtype
                weight = here.dequantize()
                is_own = weight.dtype == stored
                dense[f"{name}.weight"] = weight if is_own else weight.to(product_dtype(stored, weight.device))
            else:
                layer = PackedLinear(here, dense.pop(f"{name}.bias", None))
                model.set_submodule(name, layer)
                ways[layer.way] += 1
        weights |= dense
        return_freed_memory()
    assign_weights(model, weights, packed.path)
    model.to(device)  # type: ignore[arg-type]  # what is left: rotary tables
    widen(model)
    if merged := merge_layers(model):
        torch.cuda.empty_cache()  # the layers were copied
        log.info("%d packed layers share a product with those that read the same input", merged)
    if ways:
        log.info("packed layers on %s: %s", device, ", ".join(f"{number} by {way}" for way, number in ways.items()))
    if generation is not None:
        model.generation_config = generation
    return model, tokenizer
