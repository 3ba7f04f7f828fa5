"""RunFolder: what a run leaves on disk. Nothing half-done looks finished, and a run can be resumed."""

import errno
import fnmatch
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.file_names import (
    CARD,
    CHECKSUMS,
    CONFIG,
    EVALUATION,
    FACTS,
    INDEX,
    JOURNAL,
    LOCK,
    LOGS,
    METRICS,
    REPORT,
    RESOLVED,
    STATE,
    STREAM,
    TOKENS,
    VERSIONS,
    shard_name,
    user_path,
)
from lfq_lightning.formats import PackFormat
from lfq_lightning.grids import Grid
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.checkpoints.small_files import write_small_files
from lfq_lightning.models.families import PLAIN, Family
from lfq_lightning.packed.engines import engines
from lfq_lightning.packed.model_card import model_card
from lfq_lightning.packed.packed_folder import SHARD_CHECKSUMS
from lfq_lightning.packed.seal import recorded_files, sealed, sha256, unsealed
from lfq_lightning.token_set import TokenSet
from lfq_lightning.write_file import append_lines, to_disk, write_tensors, write_text, writing

log = logging.getLogger(__name__)

_SCRATCH = "small-files.partial"
_SHARD = "model-?????-of-?????.safetensors"
_OURS = {  # what a run writes by these names; its tokenizer's files and licences are recorded in checksums.json
    *(INDEX, CARD, CONFIG, METRICS, VERSIONS, REPORT, RESOLVED, CHECKSUMS, LOCK),
    *(FACTS, STATE, TOKENS, JOURNAL),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
    f"{EVALUATION}/evaluation.json",
}
_PATTERNS = (_SHARD, ".tmp??????", f"{EVALUATION}/answers-????????????????.jsonl", f"{_SCRATCH}/*")
_RECORDED = (INDEX, CARD, FACTS, RESOLVED, VERSIONS)  # too; what holds times carries its own checksum
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
_ENDS = (".partial", ".again")  # of names that are being written
_AGAIN = ".again"
_VERSIONS = ("lfq-lightning", "torch", "lightning", "transformers", "safetensors", "triton")


class RunFolder:
    """The output folder of one run: shard by shard while it runs; config and index, which make it a model, at the end.

    Args:
        path: the folder.
        shards: how many there will be: one for what is outside the blocks, one per block.
        overwrite: replace an earlier run's folder; never a folder of anything else.
        family: how the model's names are written on disk.
    """

    def __init__(self, path: str | Path, shards: int, overwrite: bool = False, family: Family = PLAIN) -> None:
        self.family = family
        self.path = user_path(path, "output")
        self.shards = shards
        self.overwrite = overwrite
        self._weight_map: dict[str, str] = {}
        self._checksums: dict[str, str] = {}
        self._bytes: dict[str, int] = {}
        self._lock: FileLock | None = None
        self._made = False  # the folder, to be locked

    def lock(self) -> None:
        """Take the folder for this process alone. Raises UserError if another run has it."""
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / LOCK, timeout=0)
            self._lock.acquire()
        except Timeout as error:
            self._lock = None
            raise UserError(
                f"output: {self.path} is in use by another run; wait for its end, or give another folder."
            ) from error
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise UserError(
                    f"output: {self.path} cannot be written to ({one_line(error)}); give another folder."
                ) from error
            self._lock = None
            log.warning("%s: this file system has no locks; see to it that no other run writes there", self.path)

    def unlock(self) -> None:
        """Give the folder back; one that was made for this run and has nothing in it goes."""
        if self._lock is None:
            return
        (self.path / LOCK).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def unfinished(self) -> bool:
        """A run was here and did not end, and it is not to be replaced."""
        return (self.path / FACTS).is_file() and not (self.path / CONFIG).exists() and not self.overwrite

    @property
    def state_file(self) -> Path:
        """Where the training of the current block is kept."""
        return self.path / STATE

    def check(self, bytes_needed: int) -> None:
        """Raise UserError if the folder is taken or its disk too full; changes nothing."""
        if self.path.is_file():
            raise UserError(f"output: {self.path} is a file; give a folder.")
        if self._content():
            foreign = [name for name in self._content() if not self._is_ours(name)]
            if foreign or not (self.path / JOURNAL).is_file():
                named = ", ".join(sorted(foreign)[:3]) or "none of a run"
                raise UserError(f"output: {self.path} holds other files ({named}); give a new or empty folder.")
            if (self.path / CONFIG).exists() and not self.overwrite:
                raise UserError(f"output: {self.path} holds a finished run; give another folder or --overwrite.")
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"output: {existing} is a file, so {self.path} cannot be a folder; give another one.")
        if not os.access(existing, os.W_OK):
            raise UserError(f"output: {existing} cannot be written to; give another folder.")
        there = sum(shard.stat().st_size for shard in self.path.glob("*.safetensors*")) if self.unfinished else 0
        bytes_needed -= there
        free = shutil.disk_usage(existing).free
        if free < bytes_needed:
            raise UserError(
                f"output: {self.path} needs about {bytes_needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB "
                "free; free some or give a folder on another disk."
            )

    def open(
        self,
        resolved_config: str | None,
        facts: dict[str, Any],
        tokens: tuple[TokenSet, TokenSet] | None,
        spent: dict[str, float],
    ) -> None:
        """Empty the folder of an earlier run, start the journal, and note what the run depends on.

        Args:
            resolved_config: YAML text to keep.
            facts: what a run must agree in to be resumed here; written last.
            tokens: the calibration data, where making it again is expensive.
            spent: what making it has taken.
        """
        # Config first: what is left is no model then. The journal last: until then the folder is known as a run's.
        for old in sorted(self._content(), key=lambda name: (name == JOURNAL, name == CHECKSUMS, name != CONFIG)):
            (self.path / old).unlink()
        for folder in sorted((entry for entry in self.path.rglob("*") if entry.is_dir()), reverse=True):
            if LOGS not in folder.relative_to(self.path).parts and not any(folder.iterdir()):
                folder.rmdir()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / JOURNAL).touch()
        self._describe(resolved_config)
        if tokens is not None:
            self._write_tokens(tokens, spent)
        self.write_json(FACTS, sealed(facts))

    def _describe(self, resolved_config: str | None) -> None:
        """Write what was asked for, and by which packages it is done."""
        if resolved_config is not None:
            self.write_text(RESOLVED, resolved_config)
        self.write_json(VERSIONS, {name: found for name in _VERSIONS if (found := _version(name))})

    def reopen(self, blocks: int, resolved_config: str | None) -> None:
        """Keep of the journal what a run can resume from: its whole lines, up to the first whose shard is not intact.

        Args:
            blocks: how many at most.
            resolved_config: YAML text to keep; as the facts agree, it says the same.
        """
        self._describe(resolved_config)
        kept: list[str] = []
        text = (self.path / JOURNAL).read_text(encoding="utf-8")
        for line in text.splitlines(keepends=True)[:blocks]:
            broken = self._broken(line)
            if broken is not None:
                log.warning("%s: %s; resuming from there", self.path, broken)
                break
            kept.append(line)
        if len(kept) < len(text.splitlines()):
            write_text(self.path / JOURNAL, "".join(kept))

    def _broken(self, line: str) -> str | None:
        if not line.endswith("\n"):
            return "the last line of the journal is torn"
        try:
            shards = unsealed(line)["shards"]
        except ValueError:
            return "a line of the journal is damaged"
        for name, digest in shards.items():
            if not (self.path / name).is_file():
                return f"{name} is missing"
            if sha256(self.path / name) != digest:
                return f"{name} is not what was written"
        return None

    def write_shard(self, number: int, tensors: dict[str, Tensor], again: bool = False) -> None:
        """Write shard `number` whole or not at all; `again`: beside the one that is there, until the run is finished.

        So a run that ends early has the shards that its journal speaks of.
        """
        name = shard_name(number, self.shards)
        file = self.path / (name + _AGAIN if again else name)
        write_tensors(file, self.family.to_disk(tensors), {"format": "pt"})
        self._checksums[name] = sha256(file)

    def note_shard(self, number: int, tensors: dict[str, Tensor], digest: str | None = None) -> None:
        """Count a shard in, whoever has written it; its digest is known if it was written here."""
        name = shard_name(number, self.shards)
        if digest is not None:
            self._checksums[name] = digest
        shapes = {ours: tensor.to("meta") for ours, tensor in tensors.items()}  # for the names alone
        self._weight_map |= dict.fromkeys(self.family.to_disk(shapes), name)
        self._bytes[name] = sum(tensor.nbytes for tensor in tensors.values())

    def checksums(self, numbers: Iterable[int]) -> dict[str, str]:
        """Return file → SHA-256 of some shards, for the journal."""
        names = [shard_name(number, self.shards) for number in numbers]
        return {name: self._checksums[name] for name in names if name in self._checksums}

    def append_journal(self, line: dict[str, Any]) -> None:
        """Add one JSON line to the journal and bring it to the disk."""
        append_lines(self.path / JOURNAL, [json.dumps(sealed(line))])

    def finish(
        self,
        checkpoint: Checkpoint,
        architecture: str,
        schemes: dict[str, Grid],
        packed: PackFormat,
        ignore: list[str],
        metrics: dict[str, Any],
    ) -> None:
        """Write metrics, tokenizer, index and, last of all, config.json: from here on it is a model."""
        self.write_json(METRICS, sealed(metrics))
        metadata = {"total_size": self.total_bytes, SHARD_CHECKSUMS: self._checksums}
        self.write_json(INDEX, {"metadata": metadata, "weight_map": dict(sorted(self._weight_map.items()))})
        config = _model_config(checkpoint, architecture)
        schemes = {self.family.stored_layer(layer): scheme for layer, scheme in schemes.items()}
        ignore = self.family.ignored(ignore)
        if schemes:
            config |= packed.settings(packed.config(schemes, ignore))
            loads = engines(packed, schemes, ignore)
            self.write_text(CARD, model_card(config, schemes, loads, metrics))
        text = json.dumps(config, indent=2) + "\n"
        with writing(self.path):
            self._write_small_files(checkpoint, text)
            for left in self.path.glob("*.partial"):
                left.unlink()
            for left in self.path.glob(".tmp??????"):  # of safetensors and tokenizers, in a run that was killed
                left.unlink()
            for name in self._content():
                to_disk(self.path / name)
            for written in self.path.glob(f"*{_AGAIN}"):
                written.replace(written.with_suffix(""))
        self.write_text(CONFIG, text)
        for left in (self.path / STATE, self.path / TOKENS):  # last: they are what a run resumes from
            left.unlink(missing_ok=True)

    def _write_small_files(self, checkpoint: Checkpoint, config: str) -> None:
        """Write tokenizer, generation config and licences; checksums.json records them before they take their names."""
        scratch = self.path / _SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed here
        scratch.mkdir()
        write_small_files(checkpoint, scratch)
        small = [file.relative_to(scratch) for file in sorted(scratch.rglob("*")) if file.is_file()]
        digests = {file.as_posix(): sha256(scratch / file) for file in small}
        beside = [name for name in _RECORDED if (self.path / name).is_file()]
        digests |= {name: sha256(self.path / name) for name in beside}
        digests[CONFIG] = hashlib.sha256(config.encode()).hexdigest()
        self.write_json(CHECKSUMS, sealed(digests))
        for file in small:
            (self.path / file).parent.mkdir(exist_ok=True)
            (scratch / file).replace(self.path / file)
        shutil.rmtree(scratch)

    def _write_tokens(self, sets: tuple[TokenSet, TokenSet], spent: dict[str, float]) -> None:
        named = zip(("train", "held_out"), sets, strict=True)
        tensors = {f"{name}.{part}": vars(tokens)[part] for name, tokens in named for part in ("input_ids", "mask")}
        write_tensors(self.path / TOKENS, tensors, {"spent": json.dumps(spent)})

    def read_tokens(self) -> tuple[tuple[TokenSet, TokenSet], dict[str, float]] | None:
        """Return the calibration data that a run here has kept, and what making it took."""
        try:
            with safe_open(self.path / TOKENS, "pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}
                spent = json.loads(file.metadata()["spent"])
            train, held_out = (
                TokenSet(stored[f"{name}.input_ids"], stored[f"{name}.mask"]) for name in ("train", "held_out")
            )
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return (train, held_out), spent

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors written so far."""
        return sum(self._bytes.values())

    def _content(self) -> list[str]:
        """Return the files in the folder, by their paths in it; loggers' and what goes by itself left out."""
        files = [entry for entry in self.path.rglob("*") if entry.is_file() or entry.is_symlink()]
        names = [file.relative_to(self.path).as_posix() for file in files if not _passes(file.name)]
        return [name for name in names if name != LOCK and not name.startswith(f"{LOGS}/")]

    def _is_ours(self, name: str) -> bool:
        """Tell whether a run has written this file, by its name or by its record."""
        for end in _ENDS:
            name = name.removesuffix(end)
        known = name in _OURS or any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS)
        return known or name in recorded_files(self.path)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        write_text(self.path / name, content)


def _model_config(checkpoint: Checkpoint, architecture: str) -> dict[str, Any]:
    config = checkpoint.config.to_dict()
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # as transformers 5 nests it; other engines read it here
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    config.pop("_name_or_path", None)  # a path of this machine
    config["architectures"] = [architecture]
    config["dtype"] = str(checkpoint.dtype).removeprefix("torch.")
    return config


def _passes(name: str) -> bool:
    """Tell whether a file goes by itself: activations, which have no name but for a moment, or on NFS until the end."""
    return name.endswith(STREAM) or name.startswith(".nfs")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
