"""Read one source of calibration data into token sequences, training and held-out ones apart."""

import logging
import random
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lfq_lightning.data.leading_bos import leading_bos
from lfq_lightning.data.pack_sequences import pack_sequences
from lfq_lightning.data.prompt_tokens import text_tokens
from lfq_lightning.data.read_documents import Document, read_documents
from lfq_lightning.data.read_prompts import read_prompts
from lfq_lightning.data.self_generate import self_generate
from lfq_lightning.data.source import Source
from lfq_lightning.errors import UserError
from lfq_lightning.models.chat_template import render
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.load_full_precision import load_full_precision

log = logging.getLogger(__name__)

_SHORTEST_SHARE = 8  # windows shorter than 1/8 of seq_len are dropped, unless they are packed


class SourceReader:
    """Reads sources for one model.

    Args:
        checkpoint: of the model; it writes what is generated.
        seq_len: tokens of a sequence at most.
        pack: put several short sequences into one window.
        seed: of shuffling and sampling.
        device: where the model writes.
    """

    def __init__(self, checkpoint: Checkpoint, seq_len: int, pack: bool, seed: int, device: torch.device) -> None:
        self.checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer()
        self.seq_len, self.pack, self.seed, self.device = seq_len, pack, seed, device
        self.shortest = 2 if pack else max(2, seq_len // _SHORTEST_SHARE)
        self.times_written = 0
        self.dropped = 0  # windows of the last source that were too short

    def read(self, source: Source, num_samples: int, num_held_out: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return `num_samples` training sequences, and the held-out ones.

        Held-out documents are trained on only if the others are too short, and never the same window.

        Raises UserError if the source cannot be read or has too little.
        """
        make = self._generated if source.generated else self._documents
        train, held_out = make(source, num_samples, num_held_out)
        if len(train) + len(held_out) < num_samples + num_held_out:
            short = f"{self.dropped} were dropped as shorter than {self.shortest}; " if self.dropped else ""
            pack = "set `data.pack: true`, which fills windows with several of them, " if self.dropped else ""
            raise UserError(
                f"data: {source.source} gives {len(train) + len(held_out)} sequences of {self.seq_len} tokens, but "
                f"num_samples + num_held_out is {num_samples + num_held_out}; {short}{pack}lower one of the numbers or "
                "seq_len, or give more text."
            )
        random.Random(self.seed).shuffle(train)
        return train[:num_samples], held_out

    def _generated(
        self, source: Source, num_samples: int, num_held_out: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        if source.prompts is None:
            kept = self._written(source, num_samples + num_held_out, None)
            return kept[num_held_out:], kept[:num_held_out]
        prompts = read_prompts(Path(source.prompts), "data.dataset: prompts")
        random.Random(self.seed).shuffle(prompts)
        apart = round(len(prompts) * num_held_out / (num_samples + num_held_out))
        if not 0 < apart < len(prompts):
            log.warning("data: %s has too few prompts to hold some out; all are answered in both.", source.prompts)
            return self._written(source, num_samples, prompts), self._written(source, num_held_out, prompts)
        return (
            self._written(source, num_samples, prompts[apart:]),
            self._written(source, num_held_out, prompts[:apart]),
        )

    def _written(self, source: Source, wanted: int, prompts: list[str] | None) -> list[list[int]]:
        if not wanted:
            return []
        told = f", answering {source.prompts}" if prompts is not None else ""
        log.info("data: the model writes %d sequences of up to %d tokens%s …", wanted, self.seq_len, told)
        kept, short = self_generate(
            self._model,
            self.checkpoint,
            self.tokenizer,
            wanted,
            self.seq_len,
            self.shortest,
            self.seed + 1_000_003 * self.times_written,  # training and held-out answers must not be alike
            prompts,
            self.pack,
        )
        self.times_written += 1
        self.dropped = short
        kept = self._packed(kept)[:wanted]
        self._log(source, len(kept), f"{short} dropped as shorter than {self.shortest} tokens", kept)
        return kept

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_full_precision(self.checkpoint, self.device)

    def _documents(
        self, source: Source, num_samples: int, num_held_out: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        wanted = num_samples + num_held_out
        documents: list[list[list[int]]] = []
        short = tokens = 0
        for document in read_documents(source.source, source.split, source.subset):
            windows = list(self._windows(document))
            long_enough = [window for window in windows if len(window) >= self.shortest]
            short += len(windows) - len(long_enough)
            tokens += sum(map(len, long_enough))
            if long_enough:
                documents.append(long_enough)
            # enough to choose from; a hub dataset may never end
            if len(documents) >= 8 * wanted and (not self.pack or tokens >= 8 * wanted * self.seq_len):
                break
        self.dropped = short
        random.Random(self.seed).shuffle(documents)
        held_out: list[list[int]] = []
        while len(documents) > 1 and len(self._packed(held_out)) < num_held_out:
            held_out += documents.pop()
        train = self._packed([window for document in documents for window in document])
        held_out = self._packed(held_out)
        held_out, surplus = held_out[:num_held_out], held_out[num_held_out:]
        train += surplus[: max(0, num_samples - len(train))]
        missing = num_held_out - len(held_out)
        if missing > 0:
            train, rest = train[:-missing], train[-missing:]
            held_out += rest
        found = len(train) + len(held_out)
        self._log(
            source,
            min(found, wanted),
            f"{short} dropped as shorter than {self.shortest} tokens, {max(0, found - wanted)} not needed",
            train + held_out,
        )
        return train, held_out

    def _packed(self, sequences: list[list[int]]) -> list[list[int]]:
        return pack_sequences(sequences, self.seq_len) if self.pack else sequences

    def _windows(self, document: Document) -> Iterator[list[int]]:
        """Cut a document into windows of at most seq_len tokens, each with the BOS token the tokenizer gives."""
        tokenizer = self.tokenizer
        if isinstance(document, str):
            lead = leading_bos(tokenizer)
            tokens = text_tokens(tokenizer, document)
            step = self.seq_len - len(lead)
            yield from (lead + tokens[start : start + step] for start in range(0, len(tokens), step))
            return
        if not tokenizer.chat_template:
            raise UserError("data: `messages` need a chat template, and this model has none; give `text` instead.")
        yield text_tokens(tokenizer, render(tokenizer, document.messages, tools=document.tools))[: self.seq_len]

    def _log(self, source: Source, count: int, dropped: str, sequences: list[list[int]]) -> None:
        mean = sum(map(len, sequences)) / max(1, len(sequences))
        log.info("data: %d sequences from %s, %.0f tokens on average; %s.", count, source.source, mean, dropped)
