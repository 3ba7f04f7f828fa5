"""HFCheckpoint: a Hugging Face folder with safetensors; files and tensors are those that transformers loads."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import ADAPTER, CONFIG, INDEX, SINGLE
from lfq_lightning.models.checkpoints.checkpoint import (
    LICENCES,
    Checkpoint,
    read_config,
    read_generation_config,
    read_tokenizer,
)

log = logging.getLogger(__name__)

_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints store what the model computes
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja", *LICENCES]
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them


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
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._on_disk: dict[str, str] = {}
        dtypes: dict[str, str] = {}
        for file in self._chosen_files():
            for name, tensor in _header(file).items():
                known = self.family.model_name(name)
                if known in self._files:
                    raise UserError(f"{path}: {name} is in {self._files[known].name} and in {file.name}; remove one.")
                if not name.endswith(_COMPUTED):
                    self._files[known], self._shapes[known], dtypes[known] = file, *tensor
                    self._on_disk[known] = name
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
        for name, dtype in dtypes.items():
            if dtype not in _DTYPES:
                raise UserError(
                    f"{self._files[name]}: {name} is stored as {dtype}, a dtype without a meaning here; save the "
                    "model in float32, bfloat16 or float16."
                )
        names = sorted(dtypes)
        matrices = [name for name in names if name.startswith(self.family.blocks) and "norm" not in name]
        return _DTYPES[dtypes[(matrices or names)[0]]]

    def _pass_over_tied_head(self) -> None:
        """Drop a stored head that the config ties to the embeddings. Raises UserError if it is another one."""
        head, embeddings = f"{self.family.head}.weight", f"{self.family.embeddings}.weight"
        if not self.tied or head not in self._files:
            return
        stored = self.tensors([name for name in (head, embeddings) if name in self._files])
        if not torch.equal(stored[head], stored.get(embeddings, stored[head][:0])):
            raise UserError(
                f"{self.path}: config.json says tie_word_embeddings, but {head} is stored and is not the embeddings; "
                "set tie_word_embeddings to false if the stored head is meant, else remove it from the file."
            )
        del self._files[head], self._shapes[head]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def names(self) -> list[str]:
        return sorted(self._files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted({self._file(name) for name in names}):
            try:
                with safe_open(file, "pt") as shard:
                    here = [name for name in names if self._files[name] == file]
                    found |= {name: shard.get_tensor(self._on_disk[name]).to(self.dtype) for name in here}
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read ({error}); fetch the model again.") from error
        return found

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise UserError(f"{self.path} has no tensor {name}; fetch the model again.")
        return self._files[name]

    def weight_files(self) -> list[Path]:
        return sorted(set(self._files.values()))

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
