"""CalibrationData: the token sequences a model is calibrated and held-out-tested on."""

import logging
import random
from collections.abc import Iterator
from typing import Any

import torch
from jinja2 import TemplateError
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lfq_lightning.activation_cache import BatchLoader, Splits
from lfq_lightning.checkpoints import Checkpoint
from lfq_lightning.data.read_documents import Document, check_documents, read_documents
from lfq_lightning.data.self_generate import self_generate
from lfq_lightning.errors import UserError
from lfq_lightning.peak_memory import host_bytes
from lfq_lightning.plan import BlockPlan
from lfq_lightning.token_set import TokenSet

log = logging.getLogger(__name__)

SELF_GENERATED = "self_generated"
_SHORTEST_SHARE = 8  # windows shorter than 1/8 of seq_len are dropped


class CalibrationData(LightningDataModule):
    """Token sequences for calibration and a held-out split of its own; then each block's loaders over activations.

    Args:
        dataset: `self_generated` (the model's own samples), a .txt, a .jsonl (`text` or `messages`), or a hub name.
        num_samples: calibration sequences.
        seq_len: tokens per sequence, pads included.
        num_held_out: sequences for selection and for the final table; their documents are calibrated on only if the
            others are too short, and never the same window.
        split: split of a hub dataset.
        subset: configuration of a hub dataset.
        seed: of shuffling and sampling.
        device_gb: how much of a GPU's memory the activations may take, 10^9 bytes; what is more lies in host memory.
        host_gb: how much host memory those of a process may take; what is more lies in files. If not said, half of the
            machine's, divided among its processes.
    """

    def __init__(
        self,
        dataset: str = SELF_GENERATED,
        num_samples: int = 128,
        seq_len: int = 512,
        num_held_out: int = 16,
        split: str = "train",
        subset: str | None = None,
        seed: int = 0,
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
        self.device_gb = device_gb
        self.host_gb = host_gb
        self.splits: Splits | None = None
        self.plan: BlockPlan | None = None
        self.first_step = 0

    def settings(self) -> dict[str, Any]:
        """Return what the sequences depend on, the seed apart."""
        names = ("dataset", "num_samples", "seq_len", "num_held_out", "split", "subset")
        return {name: vars(self)[name] for name in names}

    def budgets(self, processes: int) -> tuple[int, int]:
        """Return how many bytes of a process's activations may lie on its device, and in host memory."""
        host = host_bytes() // 2 // processes if self.host_gb is None else int(self.host_gb * 1e9)
        return int(self.device_gb * 1e9), host

    def place(self, splits: Splits, plan: BlockPlan, first_step: int) -> None:
        """Take the activations before a block, which the BlockScheduler has made, its plan, and the step to begin."""
        self.splits, self.plan, self.first_step = splits, plan, first_step

    def train_dataloader(self) -> BatchLoader:
        """One epoch is the training of one block; a block with nothing to train gets one batch."""
        assert self.splits is not None and self.plan is not None and self.trainer is not None
        each = self.trainer.accumulate_grad_batches
        batches = self.plan.steps * each if self.plan.learned else 1
        order = self.seed * 1_000_003 + self.plan.index
        return self.splits.train.shuffled(self.plan.batch_size, batches, order, skip=self.first_step * each)

    def val_dataloader(self) -> BatchLoader:
        assert self.splits is not None and self.plan is not None
        return self.splits.held_out.in_order(self.plan.batch_size)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for what cannot work; reads no data."""
        self.check_sizes(checkpoint)
        if self.dataset != SELF_GENERATED:
            check_documents(self.dataset)

    def check_sizes(self, checkpoint: Checkpoint) -> None:
        """Raise UserError for numbers that cannot be."""
        for name in ("num_samples", "seq_len", "num_held_out"):
            if vars(self)[name] < (2 if name == "seq_len" else 1):
                raise UserError(f"data.{name}: {vars(self)[name]} is too small; give a larger number.")
        for name in ("device_gb", "host_gb"):
            if (vars(self)[name] or 0.0) < 0:
                raise UserError(f"data.{name}: {vars(self)[name]} is negative; give 10^9 bytes, or 0 for none.")
        context = checkpoint.config.max_position_embeddings
        if self.seq_len > context:
            raise UserError(f"data.seq_len: {self.seq_len} is longer than the model's context; give at most {context}.")

    def token_sets(self, checkpoint: Checkpoint, device: torch.device) -> tuple[TokenSet, TokenSet]:
        """Return the calibration and the held-out sequences. Raises UserError if there is too little data."""
        tokenizer = checkpoint.tokenizer()
        wanted = self.num_samples + self.num_held_out
        if self.dataset == SELF_GENERATED:
            train, held_out = self._generated(checkpoint, tokenizer, device)
        else:
            train, held_out = self._read(tokenizer)
        if len(train) + len(held_out) < wanted:
            raise UserError(
                f"data: {self.dataset} gives {len(train) + len(held_out)} sequences of {self.seq_len} tokens, but "
                f"num_samples + num_held_out is {wanted}; lower one of them or seq_len, or give more text."
            )
        random.Random(self.seed).shuffle(train)
        return TokenSet.from_lists(train[: self.num_samples], self.seq_len), TokenSet.from_lists(held_out, self.seq_len)

    def _generated(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> tuple[list[list[int]], list[list[int]]]:
        wanted = self.num_samples + self.num_held_out
        log.info("data: the model writes %d sequences of up to %d tokens …", wanted, self.seq_len)
        kept, short = self_generate(checkpoint, tokenizer, wanted, self.seq_len, self._shortest, self.seed, device)
        self._log(len(kept), f"{short} dropped as shorter than {self._shortest} tokens", kept)
        return kept[self.num_held_out :], kept[: self.num_held_out]

    def _read(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[int]]]:
        wanted = self.num_samples + self.num_held_out
        documents: list[list[list[int]]] = []
        short = 0
        for document in read_documents(self.dataset, self.split, self.subset):
            windows = list(self._windows(tokenizer, document))
            long_enough = [window for window in windows if len(window) >= self._shortest]
            short += len(windows) - len(long_enough)
            if long_enough:
                documents.append(long_enough)
            if len(documents) >= 8 * wanted:  # enough to choose from; a hub dataset may never end
                break
        random.Random(self.seed).shuffle(documents)
        held_out: list[list[int]] = []
        while len(documents) > 1 and len(held_out) < self.num_held_out:
            held_out += documents.pop()
        train = [window for document in documents for window in document]
        held_out, surplus = held_out[: self.num_held_out], held_out[self.num_held_out :]
        train += surplus[: max(0, self.num_samples - len(train))]
        missing = self.num_held_out - len(held_out)
        if missing > 0:
            train, rest = train[:-missing], train[-missing:]
            held_out += rest
        found = len(train) + len(held_out)
        self._log(
            min(found, wanted),
            f"{short} dropped as shorter than {self._shortest} tokens, {max(0, found - wanted)} not needed",
            train + held_out,
        )
        return train, held_out

    @property
    def _shortest(self) -> int:
        return max(2, self.seq_len // _SHORTEST_SHARE)

    def _windows(self, tokenizer: PreTrainedTokenizerBase, document: Document) -> Iterator[list[int]]:
        """Cut a document into windows of at most seq_len tokens, each with the BOS token the tokenizer gives."""
        if isinstance(document, str):
            lead = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            with_special = tokenizer("a")["input_ids"]
            if with_special[: len(lead)] != lead:  # this tokenizer starts no text with its BOS
                lead = []
            tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            step = self.seq_len - len(lead)
            yield from (lead + tokens[start : start + step] for start in range(0, len(tokens), step))
            return
        if not tokenizer.chat_template:
            raise UserError("data: `messages` need a chat template, and this model has none; give `text` instead.")
        try:
            text = tokenizer.apply_chat_template(document, tokenize=False)
        except TemplateError as error:
            raise UserError(f"data: the chat template refuses {str(document)[:80]}…: {error}; mend the row.") from error
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: self.seq_len]

    def _log(self, count: int, dropped: str, sequences: list[list[int]]) -> None:
        mean = sum(map(len, sequences)) / max(1, len(sequences))
        log.info("data: %d sequences from %s, %.0f tokens on average; %s.", count, self.dataset, mean, dropped)
