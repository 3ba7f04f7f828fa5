"""What a quantised model lost against full precision: held-out metrics in two domains, and where greedy texts part."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lfq_lightning.data.leading_bos import leading_bos
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.evaluation.held_out import evaluate
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.meta_model import assign_weights, meta_model
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.packed.load_model import load
from lfq_lightning.token_set import TokenSet

PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 16, 48, 100
HELD_OUT = 32  # sequences of each domain


def full_precision(checkpoint: str) -> PreTrainedModel:
    """Return the model of a checkpoint with its weights in fp32, GGUF included."""
    opened = open_checkpoint(checkpoint)
    model = meta_model(opened.config, checkpoint)
    assign_weights(model, opened.tensors(opened.names()), checkpoint)
    return model.float()


def quantised(folder: Path) -> PreTrainedModel:
    """Return the model in `folder` in fp32: one of our runs, or a peer's dequantised weights."""
    if (folder / "journal.jsonl").exists() and "weight_" in (folder / "model.safetensors.index.json").read_text():
        return load(folder, dequantize=True)[0].float()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Reference:
    """The full-precision side of every comparison, computed once.

    Args:
        checkpoint: the model.
        domains: name → tokens; the first is that of the calibration.
        texts: also compare greedy texts, which takes most of the time.
    """

    def __init__(self, checkpoint: str, domains: dict[str, TokenSet], texts: bool = True) -> None:
        self.head = ModelSkeleton(open_checkpoint(checkpoint)).head(torch.float32)
        self.head.norm = torch.nn.Identity()  # the decoder's own output is normed already
        self.domains = domains
        self.prompts = next(iter(domains.values())).input_ids
        model = full_precision(checkpoint)
        self.hidden = {name: _hidden(model, tokens) for name, tokens in domains.items()}
        self.texts = self._greedy(model) if texts else None

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the columns of the table; `kl_per_sequence` (first domain) is for paired tests."""
        row: dict[str, Any] = {}
        for number, (name, tokens) in enumerate(self.domains.items()):
            student, teacher = (self.head.readout(h) for h in (_hidden(model, tokens), self.hidden[name]))
            found = evaluate({"model": student}, teacher, self.head, tokens, Ranks(torch.device("cpu")))
            values, per_sequence = found["model"]
            suffix = "" if number == 0 else f"_{name}"
            row |= {f"{metric}{suffix}": value for metric, value in values.items() if metric != "perplexity_fp"}
            if number == 0:
                row["kl_per_sequence"] = per_sequence["kl"]
        if self.texts is None:
            return row
        texts = self._greedy(model)
        same = (texts == self.texts).long().cumprod(1).sum(1)
        return row | {"tokens_before_difference": float(same.float().mean())}

    def _greedy(self, model: PreTrainedModel) -> Tensor:
        """Return NEW_TOKENS greedy tokens for each prompt, the first tokens of windows of the first domain."""
        windows = self.prompts.unfold(1, PROMPT_TOKENS, PROMPT_TOKENS).flatten(0, 1)
        prompts = windows[torch.linspace(0, len(windows) - 1, PROMPTS).long()]
        if bool((self.prompts[:, 0] == self.prompts[0, 0]).all()):  # the BOS token: each prompt gets one
            prompts[:, 0] = self.prompts[0, 0]
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        return output[:, PROMPT_TOKENS:]


def _hidden(model: PreTrainedModel, tokens: TokenSet) -> Tensor:
    with torch.no_grad():
        rows = [model.base_model(input_ids=row[None]).last_hidden_state for row in tokens.input_ids]
    return torch.cat(rows)


def tokens_of(text: Path, tokenizer: PreTrainedTokenizerBase, sequences: int, seq_len: int) -> TokenSet:
    """Cut a text into windows of seq_len tokens, each begun with the tokenizer's BOS if it gives one."""
    lead = leading_bos(tokenizer)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    step = seq_len - len(lead)
    windows = [lead + ids[start : start + step] for start in range(0, len(ids) - step + 1, step)]
    if len(windows) < sequences:
        raise SystemExit(f"{text} has {len(windows)} windows of {seq_len} tokens, but {sequences} are needed.")
    return TokenSet.from_lists(windows[:sequences], seq_len)


def reference_on(checkpoint: str, held_out: Path, other: Path, seq_len: int, texts: bool = True) -> Reference:
    """Return the reference on the first windows of two texts, that of the calibration's domain first."""
    tokenizer = open_checkpoint(checkpoint).tokenizer()
    domains = {"held_out": held_out, "other": other}
    sets = {name: tokens_of(text, tokenizer, HELD_OUT, seq_len) for name, text in domains.items()}
    return Reference(checkpoint, sets, texts)
