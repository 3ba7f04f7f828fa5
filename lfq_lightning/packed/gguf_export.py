"""Write a packed model as one GGUF file for llama.cpp."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.gguf_package import gguf_package, tensor_names
from lfq_lightning.models.checkpoints.checkpoint import read_tokenizer
from lfq_lightning.packed.gguf_blocks import block_type, blocks
from lfq_lightning.packed.gguf_tokenizer import tokenizer_fields
from lfq_lightning.packed.gguf_write import Array, Arrays, new_file, write_gguf
from lfq_lightning.packed.packed_folder import PackedFolder
from lfq_lightning.quantized_tensor import QuantizedTensor

# model type → architecture of llama.cpp, and whether it interleaves the rotary halves of q and k
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
# llama.cpp's `general.file_type` by the commonest type
_FILE_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}

_ROPE_FREQS = "rope_freqs.weight"
_TEMPLATE = "tokenizer.chat_template"

_LIKE = "convert the model by llama.cpp's convert_hf_to_gguf.py and give that file: --like FILE.gguf"


def export_gguf(source: str, output: str) -> Path:
    """Convert the packed model in `source` to the file `output` and return its path. Memory holds one shard.

    Raises UserError, and leaves nothing behind, if GGUF cannot hold the model or `output` exists.
    """
    gguf = gguf_package("writing GGUF")
    folder, target = PackedFolder(source), new_file(output)
    architecture, interleaved = _check(folder)
    kinds = [block_type(name, scheme, folder.shapes[name][1]) for name, scheme in folder.schemes.items()]
    tokenizer = read_tokenizer(folder.path)
    fields = tokenizer_fields(tokenizer, folder.config.vocab_size)
    names = tensor_names(architecture, folder.config.num_hidden_layers)

    def write_fields(writer: Any) -> None:
        _write_hyperparameters(writer, folder.settings, folder.config)
        writer.add_file_type(file_type(kinds))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in fields.items():
            _add(writer, f"tokenizer.ggml.{key}", value)
        _write_templates(writer, tokenizer.chat_template)

    def arrays() -> Arrays:
        for name, array in _arrays(folder, interleaved):
            stored = name if name == _ROPE_FREQS else names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert stored is not None, name
            yield stored, array

    write_gguf(target, architecture, write_fields, arrays)
    return target


def file_type(kinds: list[str]) -> int:
    """Return llama.cpp's `general.file_type` by the commonest of the types."""
    return _FILE_TYPES[max(kinds, key=kinds.count)]


def _check(folder: PackedFolder) -> tuple[str, bool]:
    config = folder.config
    if config.model_type not in _ARCHITECTURES:
        raise UserError(
            f"GGUF: models of type {config.model_type!r} are not written from nothing here, only "
            f"{', '.join(_ARCHITECTURES)}; {_LIKE}."
        )
    rope = folder.settings.get("rope_parameters") or {}
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise UserError(f"GGUF: rotary scaling {rope['rope_type']!r} is not written here; {_LIKE}.")
    window = folder.settings.get("sliding_window")
    if window and folder.settings.get("use_sliding_window", True) and window < config.max_position_embeddings:
        raise UserError(f"GGUF: sliding-window attention is not written here; {_LIKE}.")
    return _ARCHITECTURES[config.model_type]


def _write_hyperparameters(writer: Any, settings: dict[str, Any], config: Any) -> None:
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = _head_dim(settings)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((settings.get("rope_parameters") or settings)["rope_theta"]))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)


def _write_templates(writer: Any, templates: str | dict[str, str] | None) -> None:
    """Write one chat template, or several by their names, of which `default` has llama.cpp's own key."""
    named = templates if isinstance(templates, dict) else {"default": templates} if templates else {}
    others = {re.sub(r"\W", "_", name): text for name, text in sorted(named.items()) if name != "default"}
    if "default" in named:
        writer.add_chat_template(named["default"])
    for name, text in others.items():
        writer.add_string(f"{_TEMPLATE}.{name}", text)
    if others:
        writer.add_array(f"{_TEMPLATE}s", list(others))


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _arrays(folder: PackedFolder, interleaved: bool) -> Iterator[tuple[str, Array]]:
    """Yield every tensor's full name with its array and GGML type, in the same order each time."""
    config = folder.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if interleaved else {}
    rope = folder.settings.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        yield _ROPE_FREQS, (llama3_factors(rope, _head_dim(folder.settings)), "F32")
    for shard in folder.shards():
        for name, quantized in sorted(shard.layers.items()):
            order = interleave(quantized.codes.shape[0], heads.get(name.rpartition(".")[2]))
            codes, scale, zero = (v[order] for v in (quantized.codes, quantized.scale, quantized.zero_point))
            kind = block_type(name, quantized.scheme, codes.shape[1])
            yield f"{name}.weight", (blocks(name, QuantizedTensor(codes, scale, zero, quantized.scheme)), kind)
        for name, tensor in sorted(shard.dense.items()):
            yield name, dense_array(tensor[interleave(len(tensor), heads.get(name.split(".")[-2]))])


def _head_dim(settings: dict[str, Any]) -> int:
    return int(settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"])


def llama3_factors(rope: dict[str, Any], head_dim: int) -> "np.ndarray[Any, Any]":
    """Return what llama.cpp divides each rotary frequency by, (head_dim / 2,): Llama 3.1's stretching of long waves."""
    plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * plain / (2 * torch.pi)  # in the context of the first training
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).float().numpy()


def interleave(rows: int, heads: int | None) -> Tensor:
    """Return the order of rows in which the two rotary halves of each head alternate, as llama.cpp wants q and k."""
    order = torch.arange(rows)
    return order if heads is None else order.view(heads, 2, -1).transpose(1, 2).flatten()


def dense_array(tensor: Tensor) -> Array:
    """Return a tensor as GGUF has it: of one dimension in fp32, as llama.cpp wants it."""
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        return tensor.float().numpy(), "F32"
    if tensor.dtype == torch.float16:
        return tensor.numpy(), "F16"
    return tensor.contiguous().view(torch.uint8).numpy(), "BF16"
