"""RunFolder: what a run leaves on disk. Nothing half-done looks finished, and what is done can be gone on from."""

import fnmatch
import json
import logging
import os
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lfq_lightning.checkpoints import LICENCES, Checkpoint
from lfq_lightning.engines import engines
from lfq_lightning.errors import UserError
from lfq_lightning.families import PLAIN, Family
from lfq_lightning.formats.compressed_tensors import CompressedTensors
from lfq_lightning.model_card import CARD, model_card
from lfq_lightning.packed_folder import CHECKSUMS, INDEX, sha256
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.stream_store import STREAM
from lfq_lightning.token_set import TokenSet
from lfq_lightning.write_file import append_lines, to_disk, write_tensors, write_text, writing

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
FACTS = "facts.json"
STATE = "state.safetensors"
TOKENS = "tokens.safetensors"
LOGS = "logs"  # Lightning's loggers may write here before the run does
EVALUATION = "evaluation"  # what `lfq eval` measured
_OURS = (  # all that a run may leave in its folder
    "model-?????-of-?????.safetensors*",
    f"{INDEX}*",
    f"{CARD}*",
    *LICENCES,
    "*config.json*",
    "metrics.json*",
    "versions.json*",
    "report.html*",
    f"{FACTS}*",
    f"{STATE}*",
    f"{TOKENS}*",
    "lfq.yaml*",
    "tokenizer*",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    f"{JOURNAL}*",
    ".tmp??????",
)
_AGAIN = ".again"
_ASIDE = ("*.partial", ".tmp??????")  # being written when a run was killed: by us, by safetensors and tokenizers
_VERSIONS = ("lfq-lightning", "torch", "lightning", "transformers", "safetensors", "triton")


def shard_name(number: int, shards: int) -> str:
    """Return the file of a shard: 0 is what is outside the blocks, block i is in i + 1."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


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
        self.path = Path(path).expanduser()
        self.shards = shards
        self.overwrite = overwrite
        self._weight_map: dict[str, str] = {}
        self._checksums: dict[str, str] = {}
        self._bytes: dict[str, int] = {}

    @property
    def unfinished(self) -> bool:
        """A run was here and did not end, and it is not to be replaced."""
        return (self.path / FACTS).is_file() and not (self.path / "config.json").exists() and not self.overwrite

    @property
    def state_file(self) -> Path:
        """Where the training of the current block is kept."""
        return self.path / STATE

    def check(self, bytes_needed: int) -> None:
        """Raise UserError if the folder is taken or its disk too full; changes nothing."""
        if self.path.is_file():
            raise UserError(f"output: {self.path} is a file; give a folder.")
        if self._content():
            foreign = [entry.name for entry in self._content() if not _is_ours(entry)]
            if foreign or not (self.path / JOURNAL).is_file():
                named = ", ".join(sorted(foreign)[:3]) or "none of a run"
                raise UserError(f"output: {self.path} holds other files ({named}); give a new or empty folder.")
            if (self.path / "config.json").exists() and not self.overwrite:
                raise UserError(f"output: {self.path} holds a finished run; give another folder or --overwrite true.")
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
        self, resolved_config: str | None, facts: dict[str, Any], tokens: tuple[TokenSet, TokenSet] | None
    ) -> None:
        """Empty the folder of an earlier run, start the journal, and note what the run depends on.

        Args:
            resolved_config: YAML text to keep.
            facts: what a run must agree in to go on from here; written last.
            tokens: the calibration data, where making it again is dear.
        """
        # Config first: what is left is no model then. The journal last: until then the folder is known as a run's.
        for old in sorted(self._content(), key=lambda entry: (entry.name == JOURNAL, entry.name != "config.json")):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / JOURNAL).touch()
        if resolved_config is not None:
            self.write_text("lfq.yaml", resolved_config)
        self.write_json("versions.json", {name: found for name in _VERSIONS if (found := _version(name))})
        if tokens is not None:
            self._write_tokens(tokens)
        self.write_json(FACTS, facts)

    def reopen(self, blocks: int) -> None:
        """Keep of the journal what can be gone on from: its whole lines, up to the first whose shard is not intact.

        Args:
            blocks: how many at most.
        """
        kept: list[str] = []
        text = (self.path / JOURNAL).read_text(encoding="utf-8")
        for line in text.splitlines(keepends=True)[:blocks]:
            broken = self._broken(line)
            if broken is not None:
                log.warning("%s: %s; going on from there", self.path, broken)
                break
            kept.append(line)
        if len(kept) < len(text.splitlines()):
            write_text(self.path / JOURNAL, "".join(kept))

    def _broken(self, line: str) -> str | None:
        if not line.endswith("\n"):
            return "the last line of the journal is torn"
        for name, digest in json.loads(line)["shards"].items():
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
        named = {self.family.stored_name(tensor): value for tensor, value in tensors.items()}
        write_tensors(file, named, {"format": "pt"})
        self._checksums[name] = sha256(file)

    def note_shard(self, number: int, tensors: dict[str, Tensor], digest: str | None = None) -> None:
        """Count a shard in, whoever has written it; its digest is known if it was written here."""
        name = shard_name(number, self.shards)
        if digest is not None:
            self._checksums[name] = digest
        self._weight_map |= dict.fromkeys(map(self.family.stored_name, tensors), name)
        self._bytes[name] = sum(tensor.nbytes for tensor in tensors.values())

    def checksums(self, numbers: Iterable[int]) -> dict[str, str]:
        """Return file → SHA-256 of some shards, for the journal."""
        names = [shard_name(number, self.shards) for number in numbers]
        return {name: self._checksums[name] for name in names if name in self._checksums}

    def append_journal(self, line: dict[str, Any]) -> None:
        """Add one JSON line to the journal and bring it to the disk."""
        append_lines(self.path / JOURNAL, [json.dumps(line)])

    def finish(
        self,
        checkpoint: Checkpoint,
        architecture: str,
        schemes: dict[str, QuantScheme],
        ignore: list[str],
        metrics: dict[str, Any],
    ) -> None:
        """Write metrics, tokenizer, index and, last of all, config.json: from here on it is a model."""
        self.write_json("metrics.json", metrics)
        with writing(self.path):
            checkpoint.tokenizer().save_pretrained(self.path)
            generation = checkpoint.generation_config()
            if generation is not None:
                generation.save_pretrained(self.path)
            for file in checkpoint.licences():
                shutil.copyfile(file, self.path / file.name)
        metadata = {"total_size": self.total_bytes, CHECKSUMS: self._checksums}
        self.write_json(INDEX, {"metadata": metadata, "weight_map": dict(sorted(self._weight_map.items()))})
        config = _model_config(checkpoint, architecture)
        schemes = {self.family.stored_name(layer): scheme for layer, scheme in schemes.items()}
        ignore = [self.family.stored_name(layer) for layer in ignore]
        if schemes:
            config["quantization_config"] = CompressedTensors().config(schemes, ignore)
            loads = engines(CompressedTensors(), schemes, ignore)
            self.write_text(CARD, model_card(config, schemes, loads, metrics))
        for left in (file for pattern in _ASIDE for file in self.path.glob(pattern)):
            left.unlink()
        for file in self._content():
            to_disk(file)
        with writing(self.path):
            for written in self.path.glob(f"*{_AGAIN}"):
                written.replace(written.with_suffix(""))
        self.write_json("config.json", config)
        for left in (self.path / STATE, self.path / TOKENS):  # last: they are what to go on from
            left.unlink(missing_ok=True)

    def _write_tokens(self, sets: tuple[TokenSet, TokenSet]) -> None:
        named = zip(("train", "held_out"), sets, strict=True)
        tensors = {f"{name}.{part}": vars(tokens)[part] for name, tokens in named for part in ("input_ids", "mask")}
        write_tensors(self.path / TOKENS, tensors, {})

    def read_tokens(self) -> tuple[TokenSet, TokenSet] | None:
        """Return the calibration data that a run here has kept."""
        try:
            stored = load_file(self.path / TOKENS)
            train, held_out = (
                TokenSet(stored[f"{name}.input_ids"], stored[f"{name}.mask"]) for name in ("train", "held_out")
            )
        except (OSError, SafetensorError, KeyError):
            return None
        return train, held_out

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors written so far."""
        return sum(self._bytes.values())

    def _content(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return [entry for entry in self.path.iterdir() if entry.name != LOGS and not _passes(entry.name)]

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, content: str) -> None:
        write_text(self.path / name, content)


def _model_config(checkpoint: Checkpoint, architecture: str) -> dict[str, Any]:
    config = checkpoint.config.to_dict()
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]  # transformers 5 nests it; other engines read it here
    config["architectures"] = [architecture]
    config["dtype"] = str(checkpoint.dtype).removeprefix("torch.")
    return config


def _passes(name: str) -> bool:
    """Tell whether a file goes by itself: activations, which have no name but for a moment, or on NFS until the end."""
    return name.endswith(STREAM) or name.startswith(".nfs")


def _is_ours(entry: Path) -> bool:
    if entry.is_dir():
        return entry.name == EVALUATION
    return any(fnmatch.fnmatch(entry.name, pattern) for pattern in _OURS)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
