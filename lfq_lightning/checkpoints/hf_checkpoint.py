"""HFCheckpoint: a Hugging Face folder with safetensors."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from lfq_lightning.checkpoints.checkpoint import LICENCES, Checkpoint
from lfq_lightning.errors import UserError, one_line

_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints store what the model computes
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja", *LICENCES]


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
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; give the folder of a Hugging Face model.")
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}/config.json cannot be read: {one_line(error)[:300]}") from error
        super().__init__(path, config)
        self._files = self._index()
        self._dtype = self._stored_dtype()
        config.dtype = self._dtype

    def _index(self) -> dict[str, Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{index} cannot be read ({error}); fetch the model again.") from error
            files = {self.family.model_name(name): self.path / file for name, file in weight_map.items()}
            for file in sorted(set(files.values())):
                if not file.is_file():
                    raise UserError(f"{file} is missing, {index.name} names it; fetch the model again.")
            return files
        single = self.path / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"{self.path} has no model.safetensors; only safetensors are read, convert the model first."
            )
        try:
            with safe_open(single, "pt") as shard:
                return dict.fromkeys((self.family.model_name(name) for name in shard.keys()), single)
        except SafetensorError as error:
            raise UserError(f"{single} cannot be read ({error}); fetch the model again.") from error

    def _stored_dtype(self) -> torch.dtype:
        """Return the dtype of the blocks' matrices; norms are sometimes stored wider."""
        matrices = [name for name in self.names() if name.startswith(self.family.blocks) and "norm" not in name]
        name = (matrices or self.names())[0]
        with safe_open(self._files[name], "pt") as shard:
            return shard.get_tensor(self.family.stored_name(name)).dtype

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def names(self) -> list[str]:
        unwanted = {f"{self.family.head}.weight"} if self.config.tie_word_embeddings else set()
        return sorted(name for name in self._files if name not in unwanted and not name.endswith(_COMPUTED))

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted({self._file(name) for name in names}):
            try:
                with safe_open(file, "pt") as shard:
                    here = [name for name in names if self._files[name] == file]
                    found |= {name: shard.get_tensor(self.family.stored_name(name)).to(self.dtype) for name in here}
            except SafetensorError as error:
                raise UserError(f"{file} cannot be read ({error}); fetch the model again.") from error
        return found

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise UserError(f"{self.path} has no tensor {name}; fetch the model again.")
        return self._files[name]

    def weight_files(self) -> list[Path]:
        return sorted(set(self._files.values()))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: the tokenizer cannot be read: {one_line(error)[:300]}") from error

    def generation_config(self) -> GenerationConfig | None:
        if not (self.path / "generation_config.json").is_file():
            return None
        return GenerationConfig.from_pretrained(self.path, local_files_only=True)
