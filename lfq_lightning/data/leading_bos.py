"""The BOS token where a tokenizer begins texts with it."""

from transformers import PreTrainedTokenizerBase


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what each window of a text begins with: [BOS], or nothing if this tokenizer starts no text with it."""
    lead = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return lead if tokenizer("a")["input_ids"][: len(lead)] == lead else []
