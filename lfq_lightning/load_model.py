"""Load a packed model as a transformers model."""

from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lfq_lightning.meta_model import assign_weights, meta_model
from lfq_lightning.packed_folder import PackedFolder
from lfq_lightning.packed_linear import PackedLinear
from lfq_lightning.peak_memory import return_freed_memory


def load(folder: str | Path, dequantize: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a packed folder, in the dtype it ships in, and its tokenizer; any format in `lfq list`.

    Its linear layers stay packed (PackedLinear); with `dequantize` they are dense, bit for bit the weights that ship.

    Raises UserError if the folder is no packed model, or its files are damaged.
    """
    packed = PackedFolder(folder)
    model = meta_model(packed.config)
    weights: dict[str, Tensor] = {}
    for shard in packed.shards():
        dense = {name: tensor.clone() for name, tensor in shard.dense.items()}  # lets go of the mapped file
        for name, quantized in shard.layers.items():
            if dequantize:
                dense[f"{name}.weight"] = quantized.dequantize()
            else:
                model.set_submodule(name, PackedLinear(quantized, dense.pop(f"{name}.bias", None)))
        weights |= dense
        return_freed_memory()
    assign_weights(model, weights, packed.path)
    if (packed.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(packed.path, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(packed.path, local_files_only=True, trust_remote_code=False)
