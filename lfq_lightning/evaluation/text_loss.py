"""What a model loses on a text: KL, top-1 agreement, flip rate, perplexity, as held_out has them."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lfq_lightning.data.leading_bos import leading_bos
from lfq_lightning.data.prompt_tokens import check_tokens, text_tokens
from lfq_lightning.data.read_documents import check_documents, read_documents
from lfq_lightning.errors import UserError
from lfq_lightning.evaluation.evaluated_model import EvaluatedModel
from lfq_lightning.evaluation.score import Measure, Score
from lfq_lightning.evaluation.teacher_forced import Reading, TeacherForced, combine
from lfq_lightning.models.discover import context_length

_USUAL = 2048
_BETWEEN = "\n\n"


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


class TextLoss(Measure):
    """KL, top-1 agreement, flip rate and perplexity on texts.

    Args:
        texts: a .txt, a .jsonl or a hub name each.
        seq_len: tokens of a window; what is usual, 2048, or as far as the model reads, if None.
        limit: the first windows only, of each text.
    """

    def __init__(self, texts: list[str], seq_len: int | None, limit: int | None) -> None:
        self.texts, self.seq_len, self.limit = texts, seq_len, limit
        self._readings: dict[str, list[Reading]] = {}

    def begin(self, reference: EvaluatedModel, others: list[EvaluatedModel]) -> None:
        longest = context_length(reference.config)
        seq_len = min(_USUAL, longest) if self.seq_len is None else self.seq_len
        if not 2 <= seq_len <= longest:
            raise UserError(f"--seq-len: {seq_len} must be 2 … {longest}, which is as far as this model reads.")
        self._forced = TeacherForced(reference, others)
        for text in self.texts:
            check_documents(_named(text)[0])
            windows = text_windows(text, reference.tokenizer, seq_len)[: self.limit]
            check_tokens(windows, reference.vocab_size, reference.tokenizer)
            self._readings[text] = [Reading(window, [(0, len(window))]) for window in windows]

    def scores(self, model: EvaluatedModel) -> dict[str, dict[str, Score]]:
        names = [Path(text).name for text in self._readings]
        found = {}
        for text, name in zip(self._readings, names, strict=True):
            totals = self._forced.totals(text, self._readings[text], model)
            shown = text if names.count(name) > 1 else name
            found[f"text {shown}"] = combine([of_window for (of_window,) in totals])
        return found
