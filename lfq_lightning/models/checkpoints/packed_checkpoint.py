"""PackedCheckpoint: a packed model, dequantised layer by layer, as a model to quantise anew."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints.checkpoint import Checkpoint, read_generation_config, read_tokenizer
from lfq_lightning.packed.packed_folder import PackedFolder


class PackedCheckpoint(Checkpoint):
    """A folder in any of the formats in `lfq list`; its dequantised weights are the full-precision model."""

    def __init__(self, path: Path) -> None:
        self._folder = PackedFolder(path)
        stored = self._folder.config.dtype
        self._dtype = stored if isinstance(stored, torch.dtype) else torch.bfloat16
        super().__init__(path, self._folder.config)
        self.quantization = self._folder.quantization

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def names(self) -> list[str]:
        return sorted(self._folder.weight_shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._folder.weight_shapes

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in self._folder.weight_shapes:
                raise UserError(f"{self.path} has no tensor {name}; copy the model again.")
            found[name] = self._folder.weight(name).to(self.dtype)
        return found

    def weight_files(self) -> list[Path]:
        return [self.path / file for file in self._folder.files]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.path)

    def generation_config(self) -> GenerationConfig | None:
        return read_generation_config(self.path)
