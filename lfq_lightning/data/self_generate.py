"""Let the full-precision model write its own calibration data."""

import itertools
import random

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lfq_lightning.data.chosen_token import ChosenToken
from lfq_lightning.data.pack_sequences import pack_sequences
from lfq_lightning.data.prompt_tokens import check_tokens, prompt_tokens, text_tokens
from lfq_lightning.data.roomy_cache import roomy_cache
from lfq_lightning.errors import UserError
from lfq_lightning.models.chat_template import render
from lfq_lightning.models.checkpoints import Checkpoint

_BATCH, _BATCH_ON_GPU = 80, 40
_LONGEST_QUESTION = 64
_PATIENCE = 20  # gives up after this many times the wanted number of samples were too short
_MARK = "\u2042"  # stands for the user's words while the chat template is cut around them


def self_generate(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    seq_len: int,
    shortest: int,
    seed: int,
    prompts: list[str] | None = None,
    pack: bool = False,
) -> tuple[list[list[int]], int]:
    """Return `wanted` token sequences of `shortest` … `seq_len` tokens, sampled from the model at temperature 1.

    A chat model first samples a question where the template expects the user's words, then answers it (Magpie, arXiv
    2406.08464, section 2); a base model continues its BOS token (LLM-QAT, arXiv 2305.17888, section 3.1). Also returns
    how many sequences were dropped as too short; a model that writes nearly nothing else makes the list shorter than
    wanted.

    Args:
        model: the whole model of the checkpoint.
        prompts: what the model answers instead, in an order drawn by `seed`, again and again if there are few; all that
            it writes is kept, thinking too.
        pack: the sequences will be packed: make enough for `wanted` windows.
    """
    tokens = _template_ids(tokenizer) if tokenizer.chat_template and prompts is None else None
    if tokens is None and prompts is None and tokenizer.bos_token_id is None:
        raise UserError("data.dataset: self_generated needs a chat template or a BOS token; give a text file instead.")
    if tokens is not None and seq_len <= (least := len(tokens[0]) + len(tokens[1]) + 1):
        raise UserError(f"data.seq_len: {seq_len} leaves no room beside the chat template; give more than {least}.")
    device = model.device
    ends = end_ids(checkpoint.generation_config(), checkpoint.config, tokenizer)
    asked = _Prompts(prompts, tokenizer, seq_len, seed) if prompts is not None else None
    beginnings = asked.tokens if asked is not None else tokens or [[tokenizer.bos_token_id]]
    check_tokens(beginnings, checkpoint.text_config.vocab_size, tokenizer)
    kept: list[list[int]] = []
    short = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while (missing := wanted - len(pack_sequences(kept, seq_len) if pack else kept)) > 0:
            if short > _PATIENCE * wanted:
                break
            count = min(_BATCH if device.type == "cpu" else _BATCH_ON_GPU, missing)
            if asked is not None:
                written = _answer(model, asked.take(count), seq_len, ends)
            elif tokens is None:
                written = _sample(model, [[tokenizer.bos_token_id]] * count, seq_len, ends)
            else:
                written = _ask_and_answer(model, *tokens, count, seq_len, ends)
            long_enough = [sequence for sequence in written if len(sequence) >= shortest]
            short += count - len(long_enough)
            kept += long_enough
    return kept, short


class _Prompts:
    """Prompts in tokens, in a random order, without end."""

    def __init__(self, prompts: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int) -> None:
        tokens = [prompt for prompt in as_tokens(prompts, tokenizer) if len(prompt) < seq_len]
        if not tokens:
            raise UserError(f"data.seq_len: {seq_len} leaves no room for an answer to any prompt; give more.")
        random.Random(seed).shuffle(tokens)
        self.tokens = tokens
        self._endless = itertools.cycle(tokens)

    def take(self, count: int) -> list[list[int]]:
        return list(itertools.islice(self._endless, count))


def as_tokens(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return each prompt's tokens, put through the chat template, up to where the answer begins, if there is one."""
    if not tokenizer.chat_template:
        return [prompt_tokens(tokenizer, prompt, special=True) for prompt in prompts]
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    texts = (render(tokenizer, turn, add_generation_prompt=True) for turn in turns)
    return [text_tokens(tokenizer, text) for text in texts]


def _answer(model: PreTrainedModel, prompts: list[list[int]], seq_len: int, ends: set[int]) -> list[list[int]]:
    """Answer prompts of any lengths: a short one's answer is not cut where a long one's has to be."""
    width, least = (choose(map(len, prompts)) for choose in (max, min))
    return [row[:seq_len] for row in _sample(model, prompts, seq_len + width - least, ends)]


def _ask_and_answer(
    model: PreTrainedModel, before: list[int], after: list[int], count: int, seq_len: int, ends: set[int]
) -> list[list[int]]:
    longest = min(len(before) + _LONGEST_QUESTION, seq_len)
    asked = _sample(model, [before] * count, longest, ends)
    prompts = [[*(row[:-1] if row[-1] in ends else row), *after] for row in asked]
    prompts = [prompt for prompt in prompts if len(prompt) < seq_len]
    return _sample(model, prompts, seq_len, ends) if prompts else []


def _template_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the template's tokens before the user's words, and from there to the start of the answer."""
    text = render(tokenizer, [{"role": "user", "content": _MARK}], add_generation_prompt=True)
    before, mark, after = text.partition(_MARK)
    if not mark:
        raise UserError(
            "data.dataset: the chat template leaves out what the user says, so none can be asked; give a text."
        )
    return text_tokens(tokenizer, before), text_tokens(tokenizer, after)


def end_ids(
    generation: GenerationConfig | None, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> set[int]:
    """Return the tokens that end what a model writes."""
    ends = generation.eos_token_id if generation is not None else None
    ends = ends if ends is not None else config.get_text_config().eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {end for end in [*listed, tokenizer.eos_token_id] if end is not None}


def _draw(logits: Tensor) -> Tensor:
    """Return a token (B, 1) of each row of logits (B, V), drawn at temperature 1.

    One uniform number a row: `do_sample` draws one for each token of the vocabulary, which takes a CPU as long as the
    model's attention.
    """
    p = logits.softmax(-1)
    if logits.is_cuda:  # where a running sum is not deterministic
        return torch.multinomial(p, 1)
    below = p.cumsum(-1)
    drawn = torch.rand(len(logits), 1) * below[:, -1:]
    return torch.searchsorted(below, drawn, right=True).clamp_(max=logits.shape[1] - 1)


def _sample(model: PreTrainedModel, prompts: list[list[int]], seq_len: int, ends: set[int]) -> list[list[int]]:
    """Continue each prompt to its end token, which is kept, or until the longest has `seq_len` tokens."""
    width = max(len(prompt) for prompt in prompts)
    device = model.device
    # Padded on the left for generation; cut off again below.
    input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # the last hidden states are a slice, for which PyTorch would copy the head once per sequence
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            **roomy_cache(model),
            use_cache=True,  # whatever a training script has left in the config
            do_sample=False,  # ChosenToken leaves one
            logits_processor=LogitsProcessorList([ChosenToken(_draw)]),
            max_length=seq_len,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends) if ends else 0,
        )
    finally:
        hook.remove()
    return [
        until_end(row[width - len(prompt) :], len(prompt), ends)
        for prompt, row in zip(prompts, output.tolist(), strict=True)
    ]


def until_end(row: list[int], prompt_length: int, ends: set[int]) -> list[int]:
    """Return a row up to the first end token after its prompt, which is kept."""
    for position in range(prompt_length, len(row)):
        if row[position] in ends:
            return row[: position + 1]
    return row
