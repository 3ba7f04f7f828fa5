"""Source: one part of the calibration data, and its share of the whole."""

from dataclasses import dataclass, fields
from typing import Any

from lfq_lightning.errors import UserError
from lfq_lightning.registry import did_you_mean

SELF_GENERATED = "self_generated"


@dataclass(frozen=True)
class Source:
    """Where sequences come from.

    Args:
        source: `self_generated` (the model's own samples), a .txt, a .jsonl (`text` or `messages`), or a hub name.
        weight: its share of the sequences, relative to the other sources'.
        prompts: a file of prompts that the model answers, for `self_generated`: its own traces, thinking included. None
            lets a chat model ask itself, and a base model begin anew.
        split: of a hub dataset.
        subset: configuration of a hub dataset.
    """

    source: str
    weight: float = 1.0
    prompts: str | None = None
    split: str = "train"
    subset: str | None = None

    @property
    def generated(self) -> bool:
        """The model has to write it."""
        return self.source == SELF_GENERATED


def parse_sources(dataset: str | list[dict[str, Any]], split: str, subset: str | None) -> list[Source]:
    """Return the sources that `data.dataset` names. Raises UserError."""
    if isinstance(dataset, str):
        return [Source(dataset, split=split, subset=subset)]
    known, found = [field.name for field in fields(Source)], []
    for entry in dataset:
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            raise UserError("data.dataset: each part of a mixture is `{source: …, weight: …}`.")
        for key in entry:
            if key not in known:
                raise UserError(f"data.dataset: unknown key {key!r}: {did_you_mean(key, known)}")
        if not isinstance(entry.get("weight", 1), int | float) or not entry.get("weight", 1) > 0:
            raise UserError(f"data.dataset: the weight of {entry['source']} must be a positive number.")
        if entry.get("prompts") is not None and entry["source"] != SELF_GENERATED:
            raise UserError(f"data.dataset: prompts go with `source: {SELF_GENERATED}` only.")
        found.append(Source(**entry))
    if split != Source.split or subset is not None:
        raise UserError("data.split, data.subset: write them into the parts of the mixture, `{source: …, split: …}`.")
    if not found:
        raise UserError("data.dataset: the mixture is empty; name a source.")
    return found


def shares(sources: list[Source], count: int) -> list[int]:
    """Divide `count` sequences by weight, by largest remainders."""
    total = sum(source.weight for source in sources)
    exact = [count * source.weight / total for source in sources]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(sources)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: count - sum(whole)]:
        whole[i] += 1
    return whole
