"""Texts in tokens that a model can take: a prompt that is to be continued, and ids that have embeddings."""

import itertools
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from lfq_lightning.errors import UserError, one_line


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Return a text's tokens; with `special`, also those that the tokenizer puts around it.

    Raises UserError for a text that is no Unicode, such as one with half a surrogate pair.
    """
    try:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except (UnicodeError, TypeError) as error:
        raise UserError(f"text {text[:60]!a}… cannot be put into tokens ({one_line(error)[:100]}).") from error


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Return the tokens of a prompt. Some tokenizers end each text with EOS; what is to be continued has none."""
    tokens = text_tokens(tokenizer, text, special)
    if special:
        added = _ends(tokens, tokenizer.eos_token_id) - _ends(text_tokens(tokenizer, text), tokenizer.eos_token_id)
        tokens = tokens[: len(tokens) - max(0, added)]
    return tokens


def _ends(tokens: list[int], end: int | None) -> int:
    """Return how many times in a row `end` stands at the end."""
    return len(list(itertools.takewhile(lambda token: token == end, reversed(tokens))))


def check_tokens(sequences: Iterable[list[int]], rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a token has no row in the embeddings, which have `rows`."""
    largest = max((max(sequence) for sequence in sequences if sequence), default=-1)
    if largest >= rows:
        raise UserError(
            f"the tokenizer makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's "
            f"embeddings have {rows} rows; resize them (model.resize_token_embeddings), or take the tokenizer that "
            "belongs to the model."
        )
