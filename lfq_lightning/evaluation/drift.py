"""Generation drift: how long a model's greedy answers stay those of full precision, whether they end, and repeat.

And how far it is from full precision along the latter's answers, by position: what an error in the keys and values of
tokens long past would raise.
"""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lfq_lightning.data.prompt_tokens import check_tokens
from lfq_lightning.data.read_prompts import read_prompts
from lfq_lightning.data.self_generate import as_tokens, until_end
from lfq_lightning.evaluation.batches import batch_size, in_batches
from lfq_lightning.evaluation.evaluated_model import EvaluatedModel
from lfq_lightning.evaluation.score import Measure, Score
from lfq_lightning.evaluation.teacher_forced import Reading, TeacherForced, Totals, combine

_GRAM = 4
_BETTER = {"tokens_before_difference": True, "same_answer": True, "finished": None, "repetition": None}
_FIRST_SPAN = 256  # tokens of an answer; each further span is as long as all before it
_OWN_PROMPTS = Path(__file__).parent / "prompts.txt"


def greedy_answers(model: EvaluatedModel, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Return each prompt's greedy answer in tokens; one that has ended ends with its end token.

    Answers are kept as they come. Prompts of like length run together, padded on the left.
    """
    questions: list[list[Any]] = [["greedy", prompt, max_new_tokens, sorted(model.end_tokens())] for prompt in prompts]
    open_ones = [question for question in questions if question not in model.answers]
    if open_ones:
        open_ones.sort(key=lambda question: -len(question[1]))
        size = batch_size(model.config, len(open_ones[0][1]) + max_new_tokens, model.device)
        for batch, answers in in_batches(
            f"greedy answers of {model.source}",
            open_ones,
            size,
            lambda some: _generate(model, [question[1] for question in some], max_new_tokens),
        ):
            model.answers.add(batch, answers)
    return [model.answers[question] for question in questions]


class Drift(Measure):
    """Greedy answers against those of full precision; and KL along those, for their tokens 1-256, 257-512, 513-1024 …

    Args:
        prompts: a file of them, see `read_prompts`; a few of our own if None.
        max_new_tokens: how long an answer can get.
    """

    def __init__(self, prompts: Path | None, max_new_tokens: int) -> None:
        self.prompts, self.max_new_tokens = read_prompts(prompts or _OWN_PROMPTS, "--prompts"), max_new_tokens

    def begin(self, reference: EvaluatedModel, others: list[EvaluatedModel]) -> None:
        self._reference = reference
        self._forced = None if any(model.has_packed_head for model in others) else TeacherForced(reference, others)
        self._asked = as_tokens(self.prompts, reference.tokenizer)
        check_tokens(self._asked, reference.vocab_size, reference.tokenizer)

    def scores(self, model: EvaluatedModel) -> dict[str, dict[str, Score]]:
        answers = greedy_answers(model, self._asked, self.max_new_tokens)
        if model is self._reference:
            self._expected = answers
        values = drift_values(answers, self._expected, model.end_tokens())
        found = {name: Score.mean(column, _BETTER[name]) for name, column in values.items()}
        return {"greedy answers": found | self._along(model)}

    def _along(self, model: EvaluatedModel) -> dict[str, Score]:
        """Return the KL along full precision's answers, by stretch of an answer; nothing for heads that stay packed."""
        if self._forced is None:
            return {}
        pairs = [(prompt, answer) for prompt, answer in zip(self._asked, self._expected, strict=True) if answer]
        # what stands before a token predicts it; the last token is read too, so that each one's successor is known
        readings = [Reading([*p, *a], spans(len(p) - 1, len(a))) for p, a in pairs]
        by_span: dict[int, list[Totals]] = defaultdict(list)
        for totals in self._forced.totals("full precision's answers", readings, model):
            for number, of_span in enumerate(totals):
                by_span[number].append(of_span)
        ends = [_FIRST_SPAN << number for number in by_span]
        names = [f"kl_tokens_{end // 2 + 1 if number else 1}_{end}" for number, end in enumerate(ends)]
        return {name: combine(by_span[number])["kl"] for number, name in enumerate(names)}


def spans(first: int, length: int) -> list[tuple[int, int]]:
    """Return where an answer's stretches lie that begins after position `first`: 256 tokens, 256, 512, 1024 …"""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(_FIRST_SPAN, 2 * edges[-1])))
    return [(first + start, first + end) for start, end in pairwise(edges)]


def drift_values(answers: list[list[int]], reference: list[list[int]], ends: set[int]) -> dict[str, list[float]]:
    """Return one value per prompt: tokens before the first difference, finished or not, share of repeated 4-grams.

    Args:
        answers: of the model.
        reference: of the full-precision model.
        ends: tokens that end an answer.
    """
    return {
        "tokens_before_difference": [float(_shared(a, b)) for a, b in zip(answers, reference, strict=True)],
        "same_answer": [float(a == b) for a, b in zip(answers, reference, strict=True)],
        "finished": [float(bool(a) and a[-1] in ends) for a in answers],
        "repetition": [repetition(a) for a in answers],
    }


def repetition(answer: list[int]) -> float:
    """Return the share of an answer's 4-grams that have occurred in it before (seq-rep-4 of arXiv 1908.04319)."""
    grams = [tuple(answer[i : i + _GRAM]) for i in range(len(answer) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _shared(a: list[int], b: list[int]) -> int:
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return min(len(a), len(b))


@torch.no_grad()
def _generate(model: EvaluatedModel, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    width, ends = max(map(len, prompts)), model.end_tokens()
    pad = min(ends) if ends else 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    return [until_end(row[width:], 0, ends) for row in output.tolist()]
