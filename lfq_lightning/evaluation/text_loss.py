"""What a model loses on a text: KL, top-1 agreement, flip rate, perplexity, as held_out has them."""

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lfq_lightning.data.leading_bos import leading_bos
from lfq_lightning.data.prompt_tokens import check_tokens, text_tokens
from lfq_lightning.data.read_documents import check_documents, read_documents
from lfq_lightning.errors import UserError
from lfq_lightning.evaluation.batches import in_batches
from lfq_lightning.evaluation.evaluated_model import EvaluatedModel
from lfq_lightning.evaluation.held_out import TokenMean, held_out_metrics
from lfq_lightning.evaluation.score import Measure, Score, standard_error
from lfq_lightning.models.discover import context_length
from lfq_lightning.models.head import Head
from lfq_lightning.token_set import NO_NEXT

_TOKENS_AT_ONCE = 256  # whose logits exist together
_USUAL = 2048
_BETWEEN = "\n\n"
_BETTER = {"kl": False, "top1_agreement": True, "flip_rate": False, "perplexity": False}

Totals = dict[str, list[float]]  # metric → its sum over tokens, and their number


def text_windows(dataset: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[list[int]]:
    """Return the windows of a text by the usual WikiText-2 protocol: documents joined, tokenised as one, cut.

    Each window has `seq_len` tokens and begins with the BOS token if the tokenizer begins texts with it (a model that
    never saw a text without one is nonsense there). What is left at the end, shorter than a window, is dropped, as
    elsewhere; a text shorter than one window is one.

    Args:
        dataset: a .txt, a .jsonl, or a hub name, its subset after a colon; its split `test` is read.
    """
    texts = list(read_documents(*_named(dataset)))
    plain = [text for text in texts if isinstance(text, str)]
    if not plain:
        raise UserError(f"--text: {dataset} has no plain text; give a .txt, or a .jsonl with a field `text`.")
    lead = leading_bos(tokenizer)
    ids = text_tokens(tokenizer, _BETWEEN.join(plain))
    step = seq_len - len(lead)
    windows = [lead + ids[start : start + step] for start in range(0, max(1, len(ids) - step + 1), step)]
    if len(windows[0]) < len(lead) + 2:
        raise UserError(f"--text: {dataset} has fewer than two tokens; give a longer text.")
    return windows


def _named(dataset: str) -> tuple[str, str, str | None]:
    """Return file or hub name, split and subset of `name` or `name:subset`."""
    name, colon, subset = dataset.partition(":")
    return name, "test", subset if colon else None


@torch.no_grad()
def window_totals(student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], token_ids: list[int]) -> Totals:
    """Return each metric's sum over the tokens of a window, and their number.

    Args:
        student: hidden states (T, D) after the final norm, and the head that reads them.
        teacher: the full-precision model's.
        token_ids: T, what the hidden states were made from.
    """
    metrics = held_out_metrics()
    following = torch.tensor([*token_ids[1:], NO_NEXT], device=student[0].device)
    for start in range(0, len(token_ids), _TOKENS_AT_ONCE):
        some = slice(start, start + _TOKENS_AT_ONCE)
        log_p = [
            head.logits(head.readout(hidden[some].to(following.device).float())).log_softmax(-1)
            for hidden, head in (student, teacher)
        ]
        metrics.update(*log_p, following[some])
    found: Totals = {}
    for name, metric in metrics.items():
        assert isinstance(metric, TokenMean)
        found[str(name)] = [float(metric.total), int(metric.count)]
    return found


def combine(totals: list[Totals]) -> dict[str, Score]:
    """Return the metrics over all windows. Perplexity is exp of a mean, its standard error by the delta method."""
    found: dict[str, Score] = {}
    for name, better in _BETTER.items():
        mean = math.fsum(each[name][0] for each in totals) / sum(each[name][1] for each in totals)
        per_window = [each[name][0] / each[name][1] for each in totals]
        value, stderr, unit = mean, standard_error(per_window), ""
        if name == "perplexity":
            value, stderr, unit = math.exp(mean), math.exp(mean) * stderr, "nats"
        found[name] = Score(value, stderr, per_window, better, unit)
    return found


class TextLoss(Measure):
    """KL, top-1 agreement, flip rate and perplexity on texts.

    Args:
        texts: a .txt, a .jsonl or a hub name each.
        seq_len: tokens of a window; what is usual, 2048, or as far as the model reads, if None.
        limit: the first windows only, of each text.
    """

    def __init__(self, texts: list[str], seq_len: int | None, limit: int | None) -> None:
        self.texts, self.seq_len, self.limit = texts, seq_len, limit
        self._windows: dict[str, list[list[int]]] = {}
        self._hidden: dict[tuple[int, ...], Tensor] = {}
        self._head: Head | None = None

    def begin(self, reference: EvaluatedModel, others: list[EvaluatedModel]) -> None:
        longest = context_length(reference.config)
        seq_len = min(_USUAL, longest) if self.seq_len is None else self.seq_len
        if not 2 <= seq_len <= longest:
            raise UserError(f"--seq-len: {seq_len} must be 2 … {longest}, which is as far as this model reads.")
        self._reference, self._others = reference, others
        for text in self.texts:
            check_documents(_named(text)[0])
            self._windows[text] = text_windows(text, reference.tokenizer, seq_len)[: self.limit]
            check_tokens(self._windows[text], reference.vocab_size, reference.tokenizer)

    def scores(self, model: EvaluatedModel) -> dict[str, dict[str, Score]]:
        names = [Path(text).name for text in self._windows]
        shown = {text: text if names.count(name) > 1 else name for text, name in zip(self._windows, names, strict=True)}
        return {f"text {shown[text]}": combine(self._totals(text, model)) for text in self._windows}

    def _totals(self, text: str, model: EvaluatedModel) -> list[Totals]:
        windows = self._windows[text]
        if model is self._reference:
            everyone = [self._reference, *self._others]
            missing = [w for w in windows if any(self._question(w) not in each.answers for each in everyone)]
            for (window,), hidden in in_batches(f"{text}, full precision", missing, 1, lambda w: model.hidden(w[0])):
                self._hidden[tuple(window)] = hidden.cpu()
            if missing and self._head is None:
                self._head = model.head()
        open_ones = [window for window in windows if self._question(window) not in model.answers]
        if open_ones:
            teacher, student = self._head, model.head()
            assert teacher is not None

            def run(some: list[list[int]]) -> Totals:
                hidden = self._hidden[tuple(some[0])]
                return window_totals((model.hidden(some[0]), student), (hidden, teacher), some[0])

            for (window,), totals in in_batches(f"{text}, {model.source}", open_ones, 1, run):
                model.answers.add([self._question(window)], [totals])
        return [model.answers[self._question(window)] for window in windows]

    def _question(self, window: list[int]) -> list[object]:
        return ["text", window, self._reference.digest]
