"""Run lm-eval's tasks on a model; values per example, so that models can be paired."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate

from lfq_lightning.errors import UserError
from lfq_lightning.evaluation.answering_lm import AnsweringLM
from lfq_lightning.evaluation.evaluated_model import EvaluatedModel
from lfq_lightning.evaluation.score import Measure, Score
from lfq_lightning.evaluation.task_list import TaskList
from lfq_lightning.models.discover import context_length

_ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # (log-likelihood, words or bytes) of an example
_PERPLEXITIES = ("word_perplexity", "byte_perplexity", "perplexity")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        draws: per question, with seeds 0 … draws - 1; one greedy answer if 0.
        temperature: of the softmax.
        top_p: share of the probability that is drawn from; no other cut is made.
    """

    draws: int = 0
    temperature: float = 0.6
    top_p: float = 0.95


class TaskScores(Measure):
    """lm-eval's tasks.

    Args:
        names: of tasks, groups or tags.
        data_dir: local copies of their data; None takes the hub.
        num_fewshot: solved examples before each question; the task's own number if None.
        limit: the first examples only, of each task.
        limit_tokens: the longest answer, where it is to be shorter than the task's.
        chat: put questions through the chat template if the model has one.
        sampling: how answers are drawn.
        batch: sequences at once; found by the memory there is if None.
    """

    def __init__(
        self,
        names: list[str],
        data_dir: Path | None,
        num_fewshot: int | None,
        limit: int | None,
        limit_tokens: int | None,
        chat: bool,
        sampling: Sampling,
        batch: int | None,
    ) -> None:
        self.tasks = TaskList(names, data_dir)
        self.num_fewshot = num_fewshot
        self.limit, self.limit_tokens, self.chat, self.sampling, self.batch = limit, limit_tokens, chat, sampling, batch

    def begin(self, reference: EvaluatedModel, others: list[EvaluatedModel]) -> None:
        self.chat = self.chat and bool(reference.tokenizer.chat_template)
        longest = context_length(reference.config)
        for name in self.tasks.names:
            for leaf, task in self.tasks.load(name, self.num_fewshot, self.limit_tokens).items():
                tokens = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
                if task.OUTPUT_TYPE == "generate_until" and tokens >= longest:
                    raise UserError(
                        f"--tasks: {leaf} lets answers have {tokens} tokens, but the model reads {longest} with the "
                        f"question; give --task-tokens of less than that."
                    )
                if task.config.unsafe_code:
                    raise UserError(f"--tasks: {leaf} runs code that the model has written; use lm-eval's own command.")

    def scores(self, model: EvaluatedModel) -> dict[str, dict[str, Score]]:
        lm = AnsweringLM(model, self.batch)
        return {name: self._drawn(lm, name) for name in self.tasks.names}

    def _drawn(self, lm: AnsweringLM, name: str) -> dict[str, Score]:
        if not self.sampling.draws:
            return self._once(lm, name, {})
        temperature, top_p = self.sampling.temperature, self.sampling.top_p
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        drawn = []
        for seed in range(self.sampling.draws):
            lm.seed = seed
            drawn.append(self._once(lm, name, options))
        return {
            f"{metric} {what}": score
            for metric in drawn[0]
            for what, score in over_draws([scores[metric] for scores in drawn]).items()
        }

    def _once(self, lm: AnsweringLM, name: str, generation: dict[str, Any]) -> dict[str, Score]:
        loaded = self.tasks.load(name, self.num_fewshot, self.limit_tokens)
        for task in loaded.values():
            if task.OUTPUT_TYPE == "generate_until":
                task.config.generation_kwargs |= generation
        found = evaluate(
            lm,
            {"tasks": loaded, "groups": {}, "group_map": {}},
            limit=self.limit,
            apply_chat_template=self.chat,
            fewshot_as_multiturn=self.chat,
        )
        samples = [sample for leaf in loaded for sample in found["samples"][leaf]]
        scores = {}
        for metric, kind in {(metric, sample["filter"]): None for sample in samples for metric in sample["metrics"]}:
            values = [s[metric] for s in samples if s["filter"] == kind and metric in s["metrics"]]
            better = all(task.higher_is_better().get(metric, True) for task in loaded.values())
            score = _score(found["results"], metric, kind, values, better)
            if score is not None:
                scores[metric if kind == "none" else f"{metric} {kind}"] = score
        return scores


def _score(results: dict[str, Any], metric: str, kind: str, values: list[Any], better: bool) -> Score | None:
    """Take lm-eval's own value of a task; of a group, the mean over all examples, or none if it is no mean."""
    examples = [_one_value(metric, value) for value in values]
    known = [value for value in examples if value is not None]
    per_example = known if len(known) == len(examples) else []
    unit = "nats" if metric in _PERPLEXITIES else ""
    own = next(iter(results.values()))
    if len(results) == 1 and f"{metric},{kind}" in own:
        stderr = own.get(f"{metric}_stderr,{kind}")
        stderr = stderr if isinstance(stderr, float) else math.nan
        return Score(float(own[f"{metric},{kind}"]), stderr, per_example, better, unit)
    if not per_example:
        return None
    pooled = Score.mean(per_example, better)
    if unit:
        mean = math.exp(pooled.value)
        return Score(mean, mean * pooled.stderr, per_example, better, unit)
    return pooled


def over_draws(draws: list[Score]) -> dict[str, Score]:
    """Return avg@n over n draws, and pass@k for k = 1, 2, 4 … n where answers are right or wrong."""
    n, better = len(draws), draws[0].higher_is_better
    if not draws[0].per_example:
        return {f"avg@{n}": Score(math.fsum(draw.value for draw in draws) / n, math.nan, [], better)}
    columns = list(zip(*(draw.per_example for draw in draws), strict=True))
    found = {f"avg@{n}": Score.mean([math.fsum(values) / n for values in columns], better)}
    if {value for values in columns for value in values} <= {0.0, 1.0}:
        k = 1
        while k <= n:
            found[f"pass@{k}"] = Score.mean([pass_at_k(n, int(sum(values)), k) for values in columns], better)
            k *= 2
    return found


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the chance that one of k answers drawn from n, of which `right` are right, is right (arXiv 2107.03374,
    section 2.1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _one_value(metric: str, value: Any) -> float | None:
    """Return an example's value; of several instructions the share, of a perplexity the loss in nats.

    None for what only all examples together give a number (F1, Matthews, BLEU).
    """
    if metric in _ROLLING:
        log_likelihood, units = value
        base = math.log(2) if metric == "bits_per_byte" else 1.0
        return -log_likelihood / units / base if units else None
    if metric == "perplexity":
        return -float(value)
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(part, bool | int | float) for part in value):
        return sum(value) / len(value)
    return None
