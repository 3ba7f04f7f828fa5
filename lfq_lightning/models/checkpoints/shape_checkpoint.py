"""ShapeCheckpoint: a model known by its config alone, to plan a run before its weights are there."""

from pathlib import Path
from typing import NoReturn

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import CONFIG, user_path
from lfq_lightning.models.checkpoints.checkpoint import Checkpoint, read_config

_KNOWN = Path(__file__).parents[2] / "model_shapes"  # of models whose config needs a login, or that all ask about


class ShapeCheckpoint(Checkpoint):
    """Config and dtype; no tensors.

    Args:
        source: a folder, a config.json, or a hub id, of which only config.json is fetched.
    """

    def __init__(self, source: str) -> None:
        file = _config_file(source)
        config = read_config(file)
        super().__init__(Path(source), config)
        self._dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def names(self) -> list[str]:
        self._no_tensors()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        self._no_tensors()

    def check_layout(self, expected: dict[str, tuple[int, ...]]) -> None:
        """There is nothing to compare with."""

    def tensors(self, names: list[str]) -> dict[str, Tensor]:
        self._no_tensors()

    def weight_files(self) -> list[Path]:
        self._no_tensors()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        self._no_tensors()

    def generation_config(self) -> GenerationConfig | None:
        return None

    def _no_tensors(self) -> NoReturn:
        raise AssertionError("a shape has no tensors; planning asks for none")


def _config_file(source: str) -> Path:
    path = user_path(source, "--model")
    if path.is_dir():
        path = path / CONFIG
    if path.is_file():
        return path
    known = _KNOWN / f"{source.replace('/', '--')}.json"
    if known.is_file():
        return known
    try:
        return Path(hf_hub_download(source, CONFIG))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        names = ", ".join(sorted(file.stem.replace("--", "/") for file in _KNOWN.glob("*.json")))
        raise UserError(
            f"--model: {source!r} is no folder with a config.json, and the hub gives none ({one_line(error)[:120]}); "
            f"known without the hub: {names}."
        ) from error
