"""AnsweringLM: a model as lm-eval sees it, whose answers are kept as they come."""

from collections import Counter
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from lfq_lightning.evaluation.batches import batch_size, in_batches
from lfq_lightning.evaluation.evaluated_model import EvaluatedModel
from lfq_lightning.models.chat_template import WITHIN
from lfq_lightning.models.limits import limits

_BATCHES_AT_ONCE = 8  # answers are kept after as many
_DEFAULT_NEW_TOKENS = 256  # lm-eval's, for tasks that do not say


class AnsweringLM(LM):
    """lm-eval's model for Hugging Face, with a memory.

    Args:
        model: what answers.
        size: sequences at once; found by the memory there is if None.
    """

    def __init__(self, model: EvaluatedModel, size: int | None) -> None:
        super().__init__()
        self.evaluated, self.size = model, size
        self.seed = 0  # of sampled answers; each seed's are answers of their own
        self._inner: HFLM | None = None

    @property
    def inner(self) -> HFLM:
        """lm-eval's model; made, and its weights read, when a question has no answer yet."""
        if self._inner is None:
            self._inner = HFLM(
                pretrained=self.evaluated.model, tokenizer=self.evaluated.tokenizer, batch_size=self.size or 1
            )
        return self._inner

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(float(score), bool(greedy)) for score, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answer("generate_until", requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        with limits(*WITHIN):
            return self.inner.apply_chat_template(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return self.inner.tokenizer_name

    def _answer(self, method: str, requests: list[Instance]) -> list[Any]:
        answers = self.evaluated.answers
        questions: list[list[Any]] = []
        asked: Counter[str] = Counter()
        for request in requests:  # a question that is asked several times wants several answers
            question = [method, list(request.args), self.seed]
            asked[repr(question)] += 1
            questions.append([*question, asked[repr(question)]])
        unknown = {repr(q): (q, r) for q, r in zip(questions, requests, strict=True) if q not in answers}
        if unknown:
            pairs = sorted(unknown.values(), key=lambda pair: -len(str(pair[0][1][0])))  # the longest first
            size = self.size or self._size(method, pairs[0][1])
            every = size * _BATCHES_AT_ONCE if method != "generate_until" else size

            def run(some: list[tuple[Any, Instance]]) -> list[Any]:
                self.inner.batch_size_per_gpu = min(size, len(some))
                torch.manual_seed(self.seed)
                return getattr(self.inner, method)([request for _, request in some], disable_tqdm=True)

            for some, found in in_batches(f"{method} of {self.evaluated.source}", pairs, every, run):
                answers.add([question for question, _ in some], found)
        return [answers[question] for question in questions]

    def _size(self, method: str, longest: Instance) -> int:
        tokens = len(self.inner.tok_encode(longest.args[0]))
        if method == "generate_until":
            tokens += longest.args[1].get("max_gen_toks", _DEFAULT_NEW_TOKENS)
        return batch_size(self.evaluated.config, max(1, min(tokens, self.inner.max_length)), self.evaluated.device)
