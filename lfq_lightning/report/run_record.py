"""RunRecord: what a finished run's folder says of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.run_folder import JOURNAL


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
    evaluation: dict[str, Any] | None
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def read(cls, folder: str | Path) -> "RunRecord":
        """Raises UserError if the folder is no finished run."""
        path = Path(folder).expanduser()
        if not (path / "config.json").is_file() or not (path / JOURNAL).is_file():
            raise UserError(f"{path} is not the folder of a finished run; give the output of `lfq run`.")
        try:
            text = (path / "lfq.yaml").read_text(encoding="utf-8") if (path / "lfq.yaml").is_file() else ""
            measured = path / "evaluation" / "evaluation.json"
            return cls(
                name=path.resolve().name,
                settings=yaml.safe_load(text) or {},
                yaml_text=text,
                blocks=[json.loads(line) for line in (path / JOURNAL).read_text(encoding="utf-8").splitlines()],
                metrics=json.loads((path / "metrics.json").read_text(encoding="utf-8")),
                versions=json.loads((path / "versions.json").read_text(encoding="utf-8")),
                config=json.loads((path / "config.json").read_text(encoding="utf-8")),
                evaluation=json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None,
                tokenizer=AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False),
            )
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)[:200]}); run it again.") from error

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
