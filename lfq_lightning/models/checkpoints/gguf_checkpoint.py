"""GGUFCheckpoint: a GGUF file, dequantised tensor by tensor."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

from lfq_lightning.errors import UserError, one_line, said
from lfq_lightning.gguf_package import gguf_package, tensor_names
from lfq_lightning.models.checkpoints.checkpoint import Checkpoint
from lfq_lightning.models.experts import in_expert
from lfq_lightning.models.meta_model import meta_model

_UNIT_OFFSET = ("gemma2", "gemma3", "nemotron")  # whose norms multiply by 1 + w


class GGUFCheckpoint(Checkpoint):
    """A llama.cpp file. Needs the extra `gguf`. Its dequantised weights, in bf16, are the full-precision model."""

    def __init__(self, path: Path) -> None:
        gguf = gguf_package("reading GGUF")
        with said(lambda error: f"{path} is not a readable GGUF file ({one_line(error)[:100]}); fetch it again."):
            reader = gguf.GGUFReader(path)
            self._architecture: str = reader.fields["general.architecture"].contents()
        self._dequantize = gguf.dequantize
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        if self._architecture not in gguf.MODEL_ARCH_NAMES.values():
            raise UserError(
                f"{path}: architecture {self._architecture!r} is not known here; give the Hugging Face folder."
            )
        if self._architecture in TENSOR_PROCESSORS and self._architecture not in ("llama", *_UNIT_OFFSET):
            raise UserError(
                f"{path}: tensors of architecture {self._architecture!r} lie otherwise in GGUF than in the model: it "
                "is not read here; give the Hugging Face folder."
            )
        no_config = f"{path}: no config can be made of a GGUF of architecture {self._architecture!r}"
        with said(lambda error: f"{no_config} ({one_line(error)[:200]}); give the Hugging Face folder."):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        config.dtype = self.dtype
        super().__init__(path, config)
        wanted = meta_model(config, path).state_dict()
        if any(map(in_expert, wanted)):
            raise UserError(f"{path}: mixtures of experts are not read from GGUF; give the Hugging Face folder.")
        name_map = tensor_names(self._architecture, config.num_hidden_layers)
        found = {name: name_map.get_name(name, try_suffixes=(".weight", ".bias")) for name in wanted}
        self._names = {name: stored for name, stored in found.items() if stored in self._stored}

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def names(self) -> list[str]:
        return sorted(self._names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(map(int, reversed(self._stored[stored].shape))) for name, stored in self._names.items()}

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        missing = [name for name in names if name not in self._names]
        if missing:
            raise UserError(f"{self.path} has no tensor {missing[0]}; fetch the file again.")
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        stored = self._stored[self._names[name]]
        weight = torch.from_numpy(self._dequantize(stored.data, stored.tensor_type).copy())
        if self._architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            query = "q_proj" in name
            weight = _rotate_halves(
                weight, self.config.num_attention_heads if query else self.config.num_key_value_heads
            )
        if self._architecture in _UNIT_OFFSET and name.endswith("norm.weight"):
            weight = weight - 1  # llama.cpp stores 1 + w
        return weight.to(self.dtype)

    def weight_files(self) -> list[Path]:
        return [self.path]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:  # transformers parses the whole header for it: seconds
        return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True)

    def generation_config(self) -> GenerationConfig | None:
        return None


def _rotate_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of each head's rotary halves, (heads·2·half, …) → the order of transformers."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
