"""Checkpoint: a full-precision model on disk."""

import json
import logging
import time
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from lfq_lightning.errors import UserError, one_line, said
from lfq_lightning.file_names import CONFIG
from lfq_lightning.models.checkpoints.low_precision import check_method
from lfq_lightning.models.discover import family_of
from lfq_lightning.models.families import Family

log = logging.getLogger(__name__)

_PROCESSORS = ("*preprocessor_config.json", "processor_config.json")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_WORTH_A_LINE = 2.0  # seconds


class Checkpoint(ABC):
    """Config, tokenizer and lazily read tensors of a decoder-only model.

    Attributes:
        path: what the user named.
        config: of the model; `dtype` is that of the tensors.
        text_config: of its decoder: a part of `config` where there is more than text, else the same.
        dtype: the dtype in which tensors come and everything ships.
        family: where its parts are.
        quantization: what config.json says of weights that are quantised already; {} in full precision.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        self.path = path
        self.config = config
        self.text_config: PretrainedConfig = config.get_text_config()
        self.quantization: dict[str, Any] = config.to_dict().get("quantization_config") or {}
        if self.quantization:
            check_method(self.quantization, path)
            del config.quantization_config
            log.info("%s is quantised (%s): what it dequantises to is the reference", path, self.method)
        self.family: Family = family_of(config, path)

    @property
    def method(self) -> str | None:
        """What the weights on disk are quantised by already; None for full precision."""
        return self.quantization.get("quant_method")

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all stored tensors, as transformers names them."""

    def groups(self) -> list[list[str]]:
        """Return the names of tensors that are read together or not at all."""
        return [[name] for name in self.names()]

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all stored tensors by name; reads none of them."""

    @abstractmethod
    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Read these tensors, in `dtype`, on the CPU."""

    def extra(self) -> dict[str, Tensor]:
        """Read the tensors on disk that are none of the model's, such as further prediction heads; they ship too."""
        return {}

    def extra_layers(self) -> list[str]:
        """Return the names of the layers among them; reads none."""
        return []

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """Return the files that hold the tensors."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @abstractmethod
    def generation_config(self) -> GenerationConfig | None: ...

    def check_layout(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError if the stored tensors are not those, name and shape, that the config asks for."""
        stored = self.shapes()
        for name in sorted(set(stored) - set(expected)):
            raise UserError(
                f"{self.path} holds a tensor {name} that its config knows nothing of; the two do not match."
            )
        for name in sorted(set(expected) - set(stored)):
            raise UserError(f"{self.path} has no tensor {name}; fetch the model again.")
        for name, shape in expected.items():
            if stored[name] != shape:
                raise UserError(
                    f"{self.path}: {name} has shape {stored[name]}, but its config says {shape}; the two do not match."
                )

    def check_finite(self) -> None:
        """Read all tensors, a few at a time. Raises UserError naming the first that holds NaN or infinity."""
        started = time.perf_counter()
        for together in self.groups():
            for name, tensor in self.tensors(together).items():
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    raise UserError(f"{self.path}: {name} holds NaN or infinity; the model is broken, fetch it again.")
        if (seconds := time.perf_counter() - started) > _WORTH_A_LINE:
            log.info("model: all weights are finite (%.0f s to read them)", seconds)

    def licences(self) -> list[Path]:
        """Return the files that say under what terms the model may be used; they go where its weights go."""
        return self._beside(LICENCES)

    def processors(self) -> list[Path]:
        """Return the files that say how images, videos and sounds become inputs of the model."""
        return self._beside(_PROCESSORS) if self.path.is_dir() else []

    def _beside(self, patterns: tuple[str, ...]) -> list[Path]:
        folder = self.path if self.path.is_dir() else self.path.parent
        return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def read_config(path: Path) -> PretrainedConfig:
    """Return the config in a folder, or in a config.json. Raises UserError if it cannot be one.

    An attention kernel that a training script has left in it is forgotten: which one runs is this machine's matter.
    """
    file = path / CONFIG if path.is_dir() else path
    _check_type(file)
    with said(lambda error: f"{file} cannot be read: {one_line(error)[:300]}"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = None
    return config


def _check_type(file: Path) -> None:
    """Raise UserError for a model whose class transformers does not have; other faults are its own to find."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind, own_code = settings.get("model_type"), "auto_map" in settings
    except (OSError, ValueError, AttributeError):
        return
    if kind is not None and kind not in CONFIG_MAPPING:
        cure = (
            "its code comes with it, and such code is never run; save the model in a class of transformers"
            if own_code
            else "upgrade transformers"
        )
        raise UserError(f"{file}: transformers {version('transformers')} has no model type {kind!r}; {cure}.")


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the generation config of a folder, if it has one. Raises UserError if it cannot be read."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    with said(lambda error: f"{file} cannot be read ({one_line(error)[:200]}); mend or remove it."):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder. Raises UserError if its files are damaged."""
    with said(lambda error: f"{folder}: the tokenizer cannot be read ({one_line(error)[:200]}); copy it again."):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
