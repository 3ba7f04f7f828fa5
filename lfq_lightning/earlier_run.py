"""EarlierRun: the finished blocks of a run folder, for a run that begins with the same ones."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.run_folder import FACTS, JOURNAL, shard_name


class EarlierRun:
    """A folder that `lfq run` wrote, complete or not.

    Args:
        path: the folder. Raises UserError if it is not one.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        try:
            self.facts: dict[str, Any] = json.loads((self.path / FACTS).read_text(encoding="utf-8"))
            lines = (self.path / JOURNAL).read_text(encoding="utf-8").splitlines()
            self._reports: list[dict[str, Any]] = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(
                f"reuse: {path} is not the folder of a run ({error}); give an output of `lfq run`."
            ) from error

    def check(self, facts: dict[str, Any]) -> None:
        """Raise UserError naming the first of `facts` in which that run differs from this one."""
        for name, value in facts.items():
            if self.facts.get(name) != value:
                raise UserError(
                    f"reuse: {self.path} was made with another {name} ({self.facts.get(name)!r}, now {value!r}); "
                    "make it equal, or calibrate from the start."
                )

    def report(self, number: int, fingerprint: str) -> dict[str, Any] | None:
        """Return the journal's line of the run's block `number`, if it was finished with that fingerprint."""
        if number < len(self._reports) and self._reports[number]["fingerprint"] == fingerprint:
            return self._reports[number]
        return None

    def shard(self, number: int, shards: int) -> dict[str, Tensor]:
        """Return the tensors of a shard. Raises UserError if it cannot be read."""
        file = self.path / shard_name(number, shards)
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"reuse: {file} cannot be read ({error}); calibrate from the start.") from error
