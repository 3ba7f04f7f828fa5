"""EarlierRun: what a run folder holds, for a run that resumes it or begins with the same blocks."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lfq_lightning.errors import UserError
from lfq_lightning.file_names import FACTS, JOURNAL, shard_name, user_path
from lfq_lightning.models.families import Family
from lfq_lightning.packed.seal import sha256, unsealed
from lfq_lightning.runs.run_folder import RunFolder
from lfq_lightning.runs.spent import Spent

Facts = dict[str, dict[str, Any]]


class EarlierRun:
    """A folder that `lfq run` wrote, complete or not.

    Args:
        path: the folder. Raises UserError if it is not one.
        resumes: the same run, to be finished: everything must agree. If not, blocks are taken over (`reuse`) as far as
            they agree.
    """

    def __init__(self, path: str | Path, resumes: bool) -> None:
        self.path = user_path(path, "reuse")
        self.resumes = resumes
        try:
            self.facts: Facts = unsealed((self.path / FACTS).read_text(encoding="utf-8"))
            lines = (self.path / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
            self._reports = list(self._whole_lines(lines))
        except (OSError, ValueError) as error:
            cure = "start anew with --overwrite" if resumes else "give an output of `lfq run`"
            raise UserError(f"{self._named} is not the folder of a run, or is damaged ({error}); {cure}.") from error

    def _whole_lines(self, lines: list[str]) -> Iterator[dict[str, Any]]:
        """Yield the journal's lines; of a run to be resumed, up to the first that is torn or damaged."""
        for line in lines:
            try:
                yield unsealed(line)
            except ValueError:
                if not self.resumes and line.endswith("\n"):
                    raise
                return

    @property
    def spent(self) -> dict[str, float]:
        """What the run had taken when its last block was done."""
        return self._reports[-1]["spent"] if self._reports else vars(Spent())

    def check_version(self) -> None:
        """Raise UserError if another version of this package began that run."""
        begun = self.facts.get("shared", {}).get("version of lfq-lightning")
        if begun != version("lfq-lightning"):
            raise UserError(
                f"{self._named} was begun by lfq_lightning {begun}, and this is {version('lfq-lightning')}; finish it "
                "with that version, or give another folder, or start anew with --overwrite."
            )

    def check(self, facts: Facts) -> None:
        """Raise UserError naming the first of `facts` in which that run differs from this one."""
        for kind in facts if self.resumes else ("shared",):
            then, now = self.facts.get(kind, {}), facts[kind]
            for name in [*now, *(name for name in then if name not in now)]:
                if then.get(name) != now.get(name):
                    raise UserError(
                        f"{self._named} was made with another {name} ({_short(then.get(name))}, now "
                        f"{_short(now.get(name))}); {self._cure}"
                    )

    def report(self, number: int, fingerprint: str) -> dict[str, Any] | None:
        """Return the journal's line of the run's block `number`, if it was finished with that fingerprint.

        Raises UserError if a run to be resumed has another fingerprint: its model has changed since.
        """
        if number >= len(self._reports):
            return None
        if any(set(self._reports[number]["shards"]) & set(later["shards"]) for later in self._reports[number + 1 :]):
            raise UserError(
                f"reuse: {self.path} ended with a training of the whole model, which its blocks have been through; "
                "reuse a run without `match: whole`."
            )
        if self._reports[number]["fingerprint"] == fingerprint:
            return self._reports[number]
        if self.resumes:
            raise UserError(f"{self._named} was made with other weights in block {number}; {self._cure}")
        return None

    def shard(self, number: int, shards: int, family: Family) -> dict[str, Tensor]:
        """Return the tensors of a shard, as the model names them. Raises UserError if it is not what was written."""
        file = self.path / shard_name(number, shards)
        try:
            if sha256(file) not in self._digests(file.name):
                raise UserError(
                    f"{self._named}: {file.name} is not what was written (its SHA-256 differs); {self._cure}"
                )
            return family.to_model(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._named}: {file.name} cannot be read ({error}); {self._cure}") from error

    def _digests(self, shard: str) -> set[str]:
        """Return the checksums that the journal has of a shard: of the block, and of a training of the whole model."""
        return {report["shards"][shard] for report in self._reports if shard in report["shards"]}

    @property
    def _named(self) -> str:
        return f"output: the unfinished run in {self.path}" if self.resumes else f"reuse: {self.path}"

    @property
    def _cure(self) -> str:
        if self.resumes:
            return "make it equal to resume, or give another folder, or start anew with --overwrite."
        return "make it equal, or calibrate from the start."


def begun_precision(output: str, overwrite: bool, reuse: str | None) -> str | None:
    """Return the precision of the run that a run into `output` resumes, or else reuses; None if there is none."""
    resumed = RunFolder(output, 0, overwrite).unfinished
    if not resumed and reuse is None:
        return None
    earlier = EarlierRun(output, resumes=True) if resumed else EarlierRun(str(reuse), resumes=False)
    return earlier.facts.get("shared", {}).get("trainer.precision")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:97]}…"
