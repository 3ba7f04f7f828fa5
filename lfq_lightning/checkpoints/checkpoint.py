"""Checkpoint: a full-precision model on disk."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from lfq_lightning.errors import UserError
from lfq_lightning.families import FAMILIES, Family
from lfq_lightning.registry import did_you_mean

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


class Checkpoint(ABC):
    """Config, tokenizer and lazily read tensors of a decoder-only model.

    Attributes:
        path: what the user named.
        config: of the model; `dtype` is that of the tensors.
        dtype: the dtype in which tensors come and everything ships.
        family: where its parts are.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        self.path = path
        self.config = config
        if config.model_type not in FAMILIES:
            raise UserError(
                f"{path}: model type {config.model_type!r} is not a decoder-only family known here; "
                f"{did_you_mean(config.model_type, FAMILIES)}"
            )
        settings = config.to_dict()
        if settings.get("quantization_config"):
            raise UserError(f"{path} is already quantised; give the full-precision model.")
        self.family: Family = FAMILIES[config.model_type]

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all stored tensors, as transformers names them."""

    @abstractmethod
    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Read these tensors, in `dtype`, on the CPU."""

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """Return the files that hold the tensors."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @abstractmethod
    def generation_config(self) -> GenerationConfig | None: ...

    def licences(self) -> list[Path]:
        """Return the files that say under what terms the model may be used; they go where its weights go."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return sorted(file for pattern in LICENCES for file in folder.glob(pattern) if file.is_file())
