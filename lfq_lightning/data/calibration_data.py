"""CalibrationData: the token sequences a model is calibrated and held-out-tested on."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lfq_lightning.data.prompt_tokens import check_tokens
from lfq_lightning.data.read_documents import check_documents
from lfq_lightning.data.read_prompts import read_prompts
from lfq_lightning.data.read_source import SourceReader
from lfq_lightning.data.source import SELF_GENERATED, Source, parse_sources, shares
from lfq_lightning.errors import UserError
from lfq_lightning.file_names import user_path
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.discover import context_length
from lfq_lightning.peak_memory import host_bytes
from lfq_lightning.token_set import TokenSet


class CalibrationData(LightningDataModule):
    """Token sequences for calibration, and a held-out split of its own.

    Args:
        dataset: `self_generated` (the model's own samples), a .txt, a .jsonl (`text` or `messages`), or a hub name; or
            a mixture, a list of `{source: …, weight: …}` (see `Source`).
        num_samples: calibration sequences.
        seq_len: tokens per sequence, pads included.
        num_held_out: sequences for selection and for the final table; their documents are calibrated on only if the
            others are too short, and never the same window.
        split: split of a hub dataset.
        subset: configuration of a hub dataset.
        seed: of shuffling and sampling.
        pack: put several short sequences into one window, one after the other.
        device_gb: how much of a GPU's memory the activations may take, 10^9 bytes; what is more lies in host memory.
        host_gb: how much host memory those of a process may take; what is more lies in files. If not said, half of the
            machine's, divided among its processes.
    """

    def __init__(
        self,
        dataset: str | list[dict[str, Any]] = SELF_GENERATED,
        num_samples: int = 128,
        seq_len: int = 512,
        num_held_out: int = 16,
        split: str = "train",
        subset: str | None = None,
        seed: int = 0,
        pack: bool = False,
        device_gb: float = 0.0,
        host_gb: float | None = None,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.num_samples = num_samples
        self.seq_len = seq_len
        self.num_held_out = num_held_out
        self.split = split
        self.subset = subset
        self.seed = seed
        self.pack = pack
        self.device_gb = device_gb
        self.host_gb = host_gb

    def settings(self) -> dict[str, Any]:
        """Return what the sequences depend on, the seed apart."""
        names = ("dataset", "num_samples", "seq_len", "num_held_out", "split", "subset")
        return {name: vars(self)[name] for name in names} | ({"pack": True} if self.pack else {})

    def files(self) -> list[Path]:
        """Return the local files that the sequences are made of."""
        named = [
            user_path(name, "data.dataset") for s in self.sources for name in (s.source, s.prompts) if name is not None
        ]
        return [file for file in named if file.is_file()]

    def budgets(self, processes: int) -> tuple[int, int]:
        """Return how many bytes of a process's activations may lie on its device, and in host memory."""
        host = host_bytes() // 2 // processes if self.host_gb is None else int(self.host_gb * 1e9)
        return int(self.device_gb * 1e9), host

    def train_dataloader(self) -> Any:
        """Return the batches of the block in training, which the LightningModule has; Lightning asks here for them."""
        assert self.trainer is not None
        return self.trainer.lightning_module.train_dataloader()

    def val_dataloader(self) -> Any:
        """Return its held-out batches, likewise."""
        assert self.trainer is not None
        return self.trainer.lightning_module.val_dataloader()

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for what cannot work; reads no data."""
        self.check_sizes(checkpoint)
        for source in self.sources:
            if source.prompts is not None:
                read_prompts(Path(source.prompts), "data.dataset: prompts")
            elif not source.generated:
                check_documents(source.source)

    def check_sizes(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for numbers that cannot be."""
        for name in ("num_samples", "seq_len", "num_held_out"):
            if vars(self)[name] < (2 if name == "seq_len" else 1):
                raise UserError(f"data.{name}: {vars(self)[name]} is too small; give a larger number.")
        for name in ("device_gb", "host_gb"):
            if (vars(self)[name] or 0.0) < 0:
                raise UserError(f"data.{name}: {vars(self)[name]} is negative; give 10^9 bytes, or 0 for none.")
        context = context_length(checkpoint.config)
        if self.seq_len > context:
            raise UserError(f"data.seq_len: {self.seq_len} is longer than the model's context; give at most {context}.")

    @property
    def sources(self) -> list[Source]:
        """What the data are made of."""
        return parse_sources(self.dataset, self.split, self.subset)

    @property
    def generated(self) -> bool:
        """The model has to write some of the data, for which it is needed whole."""
        return any(source.generated for source in self.sources)

    def token_sets(self, checkpoint: Checkpoint, device: torch.device) -> tuple[TokenSet, TokenSet]:
        """Return the calibration and the held-out sequences. Raises UserError if there is too little data."""
        reader = SourceReader(checkpoint, self.seq_len, self.pack, self.seed, device)
        sources = self.sources
        parts = zip(sources, shares(sources, self.num_samples), shares(sources, self.num_held_out), strict=True)
        read = [reader.read(source, samples, held_out) for source, samples, held_out in parts]
        train, held_out = (_interleave([part[which] for part in read]) for which in (0, 1))
        check_tokens([*train, *held_out], checkpoint.text_config.vocab_size, reader.tokenizer)
        return TokenSet.from_lists(train, self.seq_len), TokenSet.from_lists(held_out, self.seq_len)


def _interleave(parts: list[list[list[int]]]) -> list[list[int]]:
    """Return the sequences of all parts, each part spread evenly over the whole."""
    placed = [(i / len(part), number, i) for number, part in enumerate(parts) for i in range(len(part))]
    return [parts[number][i] for _, number, i in sorted(placed)]
