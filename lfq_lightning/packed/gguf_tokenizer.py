"""A Hugging Face tokenizer as the metadata that llama.cpp makes its own from."""

import json
import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from lfq_lightning.errors import UserError

log = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA_3: "llama-bpe", _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Return the fields `tokenizer.ggml.…`, without that prefix, for a model with `vocab_size` embeddings.

    Raises UserError for a tokenizer that llama.cpp has no equal of here.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise UserError(f"GGUF: a tokenizer of type {model['type']} is not written here; export to another format.")
    if not model["merges"]:
        raise UserError(
            "GGUF: the tokenizer has no merges, and llama.cpp loads none without; export to another format."
        )
    added = {token["id"]: token for token in state["added_tokens"]}
    texts = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    ids = range(vocab_size)  # llama.cpp wants as many tokens as rows
    if beyond := sum(i >= vocab_size for i in texts):
        log.warning("GGUF: %d tokens have no row in the embeddings and are left out", beyond)
    fields: dict[str, Any] = {
        "tokens": [texts.get(i, f"[PAD{i}]") for i in ids],
        "token_type": [_kind(texts.get(i), added.get(i), model["unk_token"], model["byte_fallback"]) for i in ids],
        "add_bos_token": tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
        "add_eos_token": False,
    }
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    if model["byte_fallback"]:
        ranks = {merge.replace(" ", "", 1): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        lowest = -float(len(merges))
        fields |= {"model": "llama", "pre": "default", "scores": [ranks.get(texts.get(i, ""), lowest) for i in ids]}
        fields["add_space_prefix"] = _begins_with_space(state)
    else:
        fields |= {"model": "gpt2", "pre": _pre(state["pre_tokenizer"]), "merges": merges}
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    fields |= {f"{name}_token_id": i for name, i in special.items() if i is not None and i < vocab_size}
    return fields


def _begins_with_space(state: dict[str, Any]) -> bool:
    """Tell whether a text gets a space before its first word: by a normalizer, or by how it is split."""
    splits = state["pre_tokenizer"] or {}
    parts = splits.get("pretokenizers", [splits])
    spaced = any(part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in parts)
    return spaced or "Prepend" in json.dumps(state["normalizer"])


def _kind(text: str | None, added: dict[str, Any] | None, unknown: str | None, byte_fallback: bool) -> int:
    if text is None:
        return _UNUSED
    if text == unknown:
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added["special"] else _USER_DEFINED
    if byte_fallback and len(text) == 6 and text.startswith("<0x"):
        return _BYTE
    return _NORMAL


def _pre(pre_tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name of how text is split before merging."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"] and not parts[0]["add_prefix_space"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        pattern = parts[0]["pattern"].get("Regex", "")
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    raise UserError(
        "GGUF: how this tokenizer splits text is none of gpt-2, smollm, llama-bpe, qwen2; use another format."
    )
