"""RunRecord: what a finished run's folder says of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import CONFIG, JOURNAL, METRICS, RESOLVED, VERSIONS, user_path
from lfq_lightning.models.checkpoints.checkpoint import read_tokenizer
from lfq_lightning.packed.seal import changed_files, unsealed

_READ = {CONFIG, RESOLVED, VERSIONS, "tokenizer.json", "tokenizer_config.json"}  # and what seals itself


@dataclass(frozen=True)
class RunRecord:
    """A run, read from its folder.

    Args:
        name: of the folder.
        settings: lfq.yaml; empty for a run that was not started by the command line.
        yaml_text: its text.
        blocks: the journal's lines.
        metrics: metrics.json.
        versions: versions.json.
        config: config.json.
        shard_bytes: sizes of the shards: what is outside the blocks, then block after block.
        evaluation: what `lfq eval` has left there, or None.
        tokenizer: the model's.
    """

    name: str
    settings: dict[str, Any]
    yaml_text: str
    blocks: list[dict[str, Any]]
    metrics: dict[str, Any]
    versions: dict[str, str]
    config: dict[str, Any]
    shard_bytes: list[int]
    evaluation: dict[str, Any] | None
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def read(cls, folder: str | Path) -> "RunRecord":
        """Raises UserError naming the file if the folder is no finished run, or is not what the run wrote."""
        path = user_path(folder, "RUN")
        if not (path / CONFIG).is_file() or not (path / JOURNAL).is_file():
            raise UserError(f"{path} is not the folder of a finished run; give the output of `lfq run`.")
        changed = [name for name in changed_files(path) if name in _READ]
        if changed:
            raise UserError(f"{path / changed[0]} is not what the run wrote; put it back, or run it again.")
        text = _read(path / RESOLVED, str) if (path / RESOLVED).is_file() else ""
        measured = path / "evaluation" / "evaluation.json"
        return cls(
            name=path.resolve().name,
            settings=_read(path / RESOLVED, yaml.safe_load) or {} if text else {},
            yaml_text=text,
            blocks=_read(path / JOURNAL, lambda lines: [unsealed(line) for line in lines.splitlines()]),
            metrics=_read(path / METRICS, unsealed),
            versions=_read(path / VERSIONS, json.loads),
            config=_read(path / CONFIG, json.loads),
            shard_bytes=[file.stat().st_size for file in sorted(path.glob("*.safetensors"))],
            evaluation=_read(measured, json.loads) if measured.is_file() else None,
            tokenizer=read_tokenizer(path),
        )

    @property
    def model(self) -> str:
        """What was quantised."""
        named = self.settings.get("model", {}).get("checkpoint")
        return str(named) if named else str(self.config["architectures"][0])

    @property
    def model_name(self) -> str:
        """What was quantised, without the folders it lies in; a hub id is whole."""
        path = Path(self.model).expanduser()
        return path.name if path.is_absolute() or path.exists() else self.model

    def held_out(self, which: str) -> dict[str, float]:
        """Return the metrics of `full_precision`, `before_last_training` or `quantized`."""
        return self.metrics[which]["held_out"]


def _read(file: Path, parse: Callable[[str], Any]) -> Any:
    """Return what a file of a run says. Raises UserError naming it if it says nothing."""
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)[:200]}); put it back, or run it again.") from error
