"""Write a packed model into a copy of a GGUF file of the same model: any that llama.cpp converts."""

import copy
import inspect
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lfq_lightning.errors import UserError
from lfq_lightning.models.meta_model import parted_model
from lfq_lightning.packed.gguf_blocks import block_type, blocks
from lfq_lightning.packed.gguf_export import dense_array, file_type, interleave
from lfq_lightning.packed.gguf_file import GgufFile
from lfq_lightning.packed.gguf_write import Array, Arrays, new_file, write_gguf
from lfq_lightning.packed.packed_folder import PackedFolder, Shard
from lfq_lightning.quantized_tensor import QuantizedTensor

_OWN = {"general.architecture", "general.file_type", "general.quantization_version"}
_FULL = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 64  # that tell the order of a layer's rows
_ALIKE = 0.65  # least cosine of a layer with the file's: codes of 2 bits have .75 at least, other orders .5 at most
_CLOSE = 0.02  # of the final norm, which no quantizer changes

Stack = dict[str, Tensor | QuantizedTensor]  # the layers of one tensor of the file by full name: experts, or one


def export_like(source: str, output: str, like: str) -> Path:
    """Write the packed model in `source` to the file `output`, all else as in the file `like`, and return its path.

    Linear layers, their biases and the norms are the model's, in the order of rows that the file has; names, fields,
    tokenizer and every other tensor are the file's. Embeddings and head are too, unless the model has them quantised.

    Args:
        source: folder of a packed model.
        output: a new file.
        like: the same model as llama.cpp's convert_hf_to_gguf.py writes it, or quantised by llama.cpp.

    Raises UserError, and leaves nothing behind, if the two are not the same model, or GGUF cannot hold the layers.
    """
    folder, target, file = PackedFolder(source), new_file(output), GgufFile(like, "like")
    kinds = [block_type(name, scheme, folder.shapes[name][1]) for name, scheme in folder.schemes.items()]
    for name in folder.schemes:
        if _stored(f"{name}.weight", folder, file) is None:
            raise UserError(f"like: {file.path} has no tensor for {name}; it is of another model.")
    model, _ = parted_model(folder.config, folder.path)
    offsets = _norm_offsets(model)
    _check_final_norm(folder, file, offsets)

    def write_fields(writer: Any) -> None:
        import gguf

        for name, field in file.fields.items():
            if name not in _OWN and not name.startswith("GGUF."):
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
        writer.add_file_type(file_type(kinds))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def arrays() -> Arrays:
        written = set[str]()
        for shard in folder.shards():
            for name, array in _of_shard(shard, folder, file, offsets):
                written.add(name)
                yield name, array
        for name, tensor in file.tensors.items():
            if name not in written:
                yield name, (tensor.data, tensor.tensor_type.name)

    write_gguf(target, file.architecture, write_fields, arrays)
    return target


def _of_shard(shard: Shard, folder: PackedFolder, file: GgufFile, offsets: dict[str, float]) -> Arrays:
    """Yield what a shard has in place of the file's tensors."""
    stacks: dict[str, Stack] = {}
    inner = [name for name in [*folder.linears, *folder.routers] if name not in folder.outer]
    dense = {name: shard.dense[f"{name}.weight"] for name in inner if f"{name}.weight" in shard.dense}
    values: Stack = {**shard.layers, **dense}
    for name, value in values.items():
        stored = _stored(f"{name}.weight", folder, file)
        if stored is not None:
            stacks.setdefault(stored, {})[name] = value
    orders: dict[str, Tensor] = {}
    for stored, found in stacks.items():
        stack = {name: found[name] for name in sorted(found, key=_number)}
        if len(stack) != prod(file.tensors[stored].shape[2:].tolist()):
            raise UserError(f"like: {file.path} has another number of experts in {stored}; it is of another model.")
        orders |= {name: _order(stored, name, n, value, file) for n, (name, value) in enumerate(stack.items())}
        yield stored, _stacked(stack, orders, file.tensors[stored].tensor_type.name)
    for full, tensor in shard.dense.items():
        name, _, last = full.rpartition(".")
        stored = _stored(full, folder, file)
        if stored is not None and last == "bias" and name in orders and name not in folder.outer:
            yield stored, dense_array(tensor[orders[name]])
        elif stored is not None and name in offsets:
            yield stored, dense_array(tensor.float() + (offsets[name] if last == "weight" else 0))


def _stored(name: str, folder: PackedFolder, file: GgufFile) -> str | None:
    """Return the file's name for a tensor of the model, which llama.cpp knows by its name in checkpoints."""
    return file.name_of(folder.family.stored_name(name))


def _number(name: str) -> int:
    """Return an expert's number; 0 of a layer that is none."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _stacked(stack: Stack, orders: dict[str, Tensor], kind: str) -> Array:
    """Return layers as one tensor of the file; `kind` is the type of those in full precision."""
    parts, kinds = [], set[str]()
    for name, value in stack.items():
        order = orders[name]
        if isinstance(value, QuantizedTensor):
            codes, scale, zero = (part[order] for part in (value.codes, value.scale, value.zero_point))
            quantized = QuantizedTensor(codes, scale, zero, value.scheme)
            parts.append(blocks(name, quantized))
            kinds.add(block_type(name, value.scheme, value.codes.shape[1]))
        else:
            array, found = dense_array(value[order].to(_FULL.get(kind, value.dtype)))
            parts.append(array)
            kinds.add(found)
    if len(kinds) > 1:
        raise UserError(
            f"GGUF: {next(iter(stack))} and {len(stack) - 1} more are one tensor there, and here on "
            f"{' and '.join(sorted(kinds))}; quantise them all alike."
        )
    return parts[0] if len(parts) == 1 else np.stack(parts), kinds.pop()


def _order(stored: str, name: str, number: int, value: Tensor | QuantizedTensor, file: GgufFile) -> Tensor:
    """Return the order of a layer's rows in the file, found by comparison. Raises UserError if it is of none known."""
    tensor = file.tensors[stored]
    rows, width = value.shape if isinstance(value, Tensor) else value.codes.shape
    if tuple(tensor.shape[:2]) != (width, rows):
        raise UserError(
            f"like: {file.path} has {stored} in shape {tuple(tensor.shape[:2])[::-1]}, and {name} is {(rows, width)}; "
            "it is of another model."
        )
    here = value.float() if isinstance(value, Tensor) else value.dequantize().float()
    sample = torch.linspace(0, rows - 1, min(rows, _ROWS)).long()
    there = _rows(tensor, number, sample)
    likeness = {
        order: float(torch.cosine_similarity(here[order[sample]].flatten(), there.flatten(), dim=0))
        for order in _known_orders(rows, file)
    }
    order = max(likeness, key=likeness.__getitem__)
    if likeness[order] < _ALIKE:
        raise UserError(
            f"like: {stored} of {file.path} is not {name}, nor that with its rows in an order that is known (cosine "
            f"{likeness[order]:.2f}); is it of the same model?"
        )
    return order


def _rows(tensor: Any, number: int, sample: Tensor) -> Tensor:
    """Return some rows of one of the file's layers, in fp32."""
    import gguf

    data = tensor.data[number] if tensor.data.ndim == 3 else tensor.data
    return torch.from_numpy(gguf.dequantize(data[sample.numpy()], tensor.tensor_type).copy())


def _known_orders(rows: int, file: GgufFile) -> Iterator[Tensor]:
    """Yield orders of rows that llama.cpp's converter knows."""
    yield torch.arange(rows)
    counts = set[int]()
    for key in ("attention.head_count", "attention.head_count_kv"):
        found = file.of_architecture(key, 0)
        counts |= set(found) if isinstance(found, list) else {found}
    for heads in sorted(counts - {0}):
        if rows % (2 * heads) == 0:
            yield interleave(rows, heads)  # rotary halves
        if rows % (3 * heads) == 0:
            yield torch.arange(rows).view(heads, 3, -1).transpose(0, 1).flatten()  # q, k, v of each head


def _norm_offsets(model: PreTrainedModel) -> dict[str, float]:
    """Return for each norm what it adds to its weight: llama.cpp has the sum, Gemma's family the weight around 0."""
    found: dict[str, float] = {}
    kinds: dict[type[nn.Module], float] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" not in type(module).__name__.lower() or not isinstance(weight, Tensor) or weight.dim() != 1:
            continue
        if type(module) not in kinds:
            kinds[type(module)] = _offset(module, len(weight))
        found[name] = kinds[type(module)]
    return found


@torch.no_grad()
def _offset(norm: nn.Module, width: int) -> float:
    twin = copy.copy(norm)
    zeros = nn.Parameter(torch.zeros(width))
    twin._parameters = {name: None if old is None else zeros for name, old in norm._parameters.items()}
    needed = [p for p in inspect.signature(norm.forward).parameters.values() if p.default is p.empty]
    rows = torch.linspace(-1, 1, width)[None]
    return float(twin(*([rows] * len(needed))).any())  # rows, and maybe a gate


def _check_final_norm(folder: PackedFolder, file: GgufFile, offsets: dict[str, float]) -> None:
    """Raise UserError if the file's final norm is not the model's."""
    name = next((name for name in offsets if _stored(f"{name}.weight", folder, file) == "output_norm.weight"), None)
    if name is None:
        return
    here = folder.weight(f"{name}.weight").float() + offsets[name]
    there = _rows(file.tensors["output_norm.weight"], 0, torch.arange(len(here)))
    if len(there) != len(here) or float((here - there).norm()) > _CLOSE * float(here.norm()):
        raise UserError(f"like: the final norm of {file.path} is not the model's; is it of the same model?")
