"""HFCheckpoint: a Hugging Face folder with safetensors; files and tensors are those that transformers loads."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lfq_lightning.errors import UserError, one_line, said
from lfq_lightning.file_names import ADAPTER, CONFIG, INDEX, SINGLE
from lfq_lightning.models.checkpoints.checkpoint import (
    LICENCES,
    Checkpoint,
    read_config,
    read_generation_config,
    read_tokenizer,
)
from lfq_lightning.models.checkpoints.low_precision import dequantised, shape_of, weights_of
from lfq_lightning.precision import cast

log = logging.getLogger(__name__)

_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints store what the model computes
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja", *LICENCES]
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them
_FLOATS = (".weight", ".bias")  # other tensors may hold whole numbers, such as tables
_WHOLE = {"BOOL", "U8", "I8", "I16", "I32", "I64"}


def download(hub_id: str) -> Path:
    """Fetch a model from the hub, safetensors only; a copy in the local cache serves offline."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error)[:200]
        raise UserError(
            f"model.checkpoint: {hub_id!r} is neither a folder here nor a model that the hub gives ({reason}); "
            "check the spelling, the network, and `hf auth login` for a gated model."
        ) from error


class HFCheckpoint(Checkpoint):
    """A folder as `save_pretrained` writes it; one or several safetensors shards."""

    def __init__(self, path: Path) -> None:
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} has no config.json; give the folder of a Hugging Face model.")
        if (path / ADAPTER).is_file():
            raise UserError(
                f"{path} holds an adapter ({ADAPTER}), which transformers applies to the model and which is not read "
                "here; merge it into the weights and save those (peft: merge_and_unload), or move it elsewhere."
            )
        super().__init__(path, read_config(path))
        self._files: dict[str, Path] = {}  # by the names on disk
        dtypes: dict[str, str] = {}
        stored: dict[str, tuple[int, ...]] = {}
        for file in self._chosen_files():
            for name, (shape, dtype) in _header(file).items():
                if name in self._files:
                    raise UserError(f"{path}: {name} is in {self._files[name].name} and in {file.name}; remove one.")
                if not name.endswith(_COMPUTED):
                    self._files[name], stored[name], dtypes[name] = file, shape, dtype
        self._made_of = weights_of(stored) if self.quantization else {name: (name,) for name in stored}
        stored = {name: shape_of(parts, stored) for name, parts in self._made_of.items()}
        renamed = {name: self.family.model_name(name) for name in stored}
        self._extra = {name: stored.pop(name) for name, ours in renamed.items() if self.family.is_extra(ours)}
        self._parts: dict[str, tuple[str, ...]] = {}  # of each tensor of the model, on disk
        self._shapes: dict[str, tuple[int, ...]] = {}
        for parts in self.family.groups(stored):
            with said(partial(self._unfit, parts)):
                made = self.family.to_model({part: torch.empty(stored[part], device="meta") for part in parts})
            for name, tensor in made.items():
                if name in self._parts:
                    raise UserError(f"{path} holds {name} twice, as {self._parts[name][0]} and {parts[0]}; remove one.")
                self._parts[name], self._shapes[name] = parts, tuple(tensor.shape)
        if not self._files:
            raise UserError(f"{path}: its safetensors hold no tensors; fetch the model again.")
        self._dtype = self._stored_dtype(dtypes)
        self._pass_over_tied_head()
        self.config.dtype = self._dtype

    def _chosen_files(self) -> list[Path]:
        """Return the files that transformers reads: a single file goes before an index."""
        single, index = self.path / SINGLE, self.path / INDEX
        if single.is_file():
            if index.is_file():
                log.warning(
                    "%s: %s is read, as transformers does; %s and its shards are not.", self.path, SINGLE, INDEX
                )
            return [single]
        if not index.is_file():
            raise UserError(f"{self.path} has no {SINGLE}; only safetensors are read, convert the model first.")
        files = _index_files(index)
        for name in files:
            if not (self.path / name).is_file():
                raise UserError(f"{self.path / name} is missing, {index.name} names it; fetch the model again.")
        return [self.path / name for name in files]

    def _stored_dtype(self, dtypes: dict[str, str]) -> torch.dtype:
        """Return the dtype of the blocks' matrices; norms are sometimes stored wider."""
        if self.quantization:
            return torch.bfloat16
        for name, dtype in dtypes.items():
            if dtype not in _DTYPES and (dtype not in _WHOLE or name.endswith(_FLOATS)):
                raise UserError(
                    f"{self._files[name]}: {name} is stored as {dtype}, a dtype without a meaning here; save the "
                    "model in float32, bfloat16 or float16."
                )
        names = sorted(self._parts)
        matrices = [name for name in names if name.startswith(self.family.blocks) and "norm" not in name]
        return _DTYPES[dtypes[self._parts[(matrices or names)[0]][0]]]

    def _pass_over_tied_head(self) -> None:
        """Drop a stored head that the config ties to the embeddings. Raises UserError if it is another one."""
        head, embeddings = f"{self.family.head}.weight", f"{self.family.embeddings}.weight"
        if not self.tied or head not in self._parts:
            return
        stored = self.tensors([name for name in (head, embeddings) if name in self._parts])
        if not torch.equal(stored[head], stored.get(embeddings, stored[head][:0])):
            raise UserError(
                f"{self.path}: config.json says tie_word_embeddings, but {head} is stored and is not the embeddings; "
                "set tie_word_embeddings to false if the stored head is meant, else remove it from the file."
            )
        del self._parts[head], self._shapes[head]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def names(self) -> list[str]:
        return sorted(self._parts)

    def groups(self) -> list[list[str]]:
        found: dict[tuple[str, ...], list[str]] = {}
        for name in self.names():
            found.setdefault(self._parts[name], []).append(name)
        return [*found.values()]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        for name in names:
            if name not in self._parts:
                raise UserError(f"{self.path} has no tensor {name}; fetch the model again.")
        groups = dict.fromkeys(self._parts[name] for name in names)
        stored = self._read([part for parts in groups for part in parts])
        found: dict[str, Tensor] = {}
        for parts in groups:
            found |= self.family.to_model({part: stored.pop(part) for part in parts})
        return {name: cast(found.pop(name), self.dtype) for name in names}

    def _read(self, weights: list[str]) -> dict[str, Tensor]:
        """Read weights by their names on disk; quantised ones are dequantised."""
        found: dict[str, Tensor] = {}
        stored = [part for name in weights for part in self._made_of[name]]
        for file in sorted({self._files[name] for name in stored}):
            try:
                with safe_open(file, "pt") as shard:
                    found |= {name: shard.get_tensor(name) for name in stored if self._files[name] == file}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read ({error}); fetch the model again.") from error
        block = self.quantization.get("weight_block_size")
        return {name: dequantised(self._made_of[name], found, block) for name in weights}

    def _unfit(self, parts: tuple[str, ...], error: Exception) -> str:
        return (
            f"{self.path}: transformers cannot make its tensors of {', '.join(parts[:3])} ({one_line(error)[:100]}); "
            "fetch the model again."
        )

    def extra(self) -> dict[str, Tensor]:
        stored = self._read([*self._extra])
        return {self.family.model_name(name): cast(tensor, self.dtype) for name, tensor in stored.items()}

    def extra_layers(self) -> list[str]:
        matrices = [name for name, shape in self._extra.items() if name.endswith(".weight") and len(shape) == 2]
        return [self.family.model_layer(name.removesuffix(".weight")) for name in matrices]

    def weight_files(self) -> list[Path]:
        weights = {weight for parts in self._parts.values() for weight in parts}
        return sorted({self._files[part] for weight in weights for part in self._made_of[weight]})

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.path)

    def generation_config(self) -> GenerationConfig | None:
        return read_generation_config(self.path)


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of each tensor of a file; reads none of them."""
    try:
        with safe_open(file, "pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}); fetch the model again.") from error


def _index_files(index: Path) -> list[str]:
    """Return the names of the shards that an index lists."""
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        files = sorted(set(content["weight_map"].values()))
        outside = [file for file in files if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of shards ({one_line(error)[:100]}); fetch the model again.") from error
    if outside or not files:
        what = f"names {outside[0]!r}, which is not in its folder" if outside else "names no files"
        raise UserError(f"{index} {what}; fetch the model again.")
    return files
