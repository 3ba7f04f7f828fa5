"""TokenProfile: at which tokens a quantised model departs from full precision, and how sure it is of itself."""

import heapq
from typing import Any

import torch
from torch import Tensor

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.token_set import NO_NEXT

_POSITIONS = 16  # bins over a sequence
_FREQUENCIES = 12  # 0, 1, 2 … 3, 4 … 7, … occurrences
_CONFIDENCES = 10  # bins of the largest probability
_MARGINS, _MARGIN_WIDTH = 24, 0.25  # bins of the difference of the two largest logits, in nats
_EXAMPLES, _CONTEXT = 12, 32


class TokenProfile:
    """Counts over held-out tokens.

    A flip is a token whose most likely successor is another one than full precision's.

    Args:
        frequency: (V,), how often each token occurs in the calibration sequences.
    """

    def __init__(self, frequency: Tensor) -> None:
        self.frequency = frequency
        bins = {
            "position": _POSITIONS,
            "frequency": _FREQUENCIES,
            "confidence": _CONFIDENCES,
            "confidence_fp": _CONFIDENCES,
            "margin": _MARGINS,
        }
        self._sums = {
            f"{name}.{what}": torch.zeros(size, dtype=torch.float64)
            for name, size in bins.items()
            for what in (("count", "sure", "right") if name.startswith("confidence") else ("count", "flips"))
        }
        self._examples: list[tuple[float, int, dict[str, Any]]] = []
        self._seen = 0

    def update(self, student: Tensor, teacher: Tensor, token_ids: Tensor, next_token: Tensor, seq_len: int) -> None:
        """Take one sequence: log-probabilities (M, V) fp32, its tokens (M,), the next ones (M,), NO_NEXT if unknown.

        Args:
            seq_len: tokens of a sequence with its pads.
        """
        top_s, top_t = student.argmax(-1), teacher.argmax(-1)
        flips = (top_s != top_t).double().cpu()
        positions = torch.arange(len(token_ids)) * _POSITIONS // seq_len
        often = self.frequency[top_t.cpu()].double().add(1).log2().ceil().long().clamp_max(_FREQUENCIES - 1)
        two = teacher.topk(2, dim=-1).values
        margins = ((two[:, 0] - two[:, 1]) / _MARGIN_WIDTH).long().clamp_max(_MARGINS - 1).cpu()
        for name, bins in (("position", positions), ("frequency", often), ("margin", margins)):
            self._add(f"{name}.count", bins, torch.ones_like(flips))
            self._add(f"{name}.flips", bins, flips)
        known = (next_token != NO_NEXT).cpu()
        for name, log_p, top in (("confidence", student, top_s), ("confidence_fp", teacher, top_t)):
            sure = log_p.amax(-1).exp().double().cpu()[known]
            right = (top == next_token).double().cpu()[known]
            bins = (sure * _CONFIDENCES).long().clamp_max(_CONFIDENCES - 1)
            self._add(f"{name}.count", bins, torch.ones_like(sure))
            self._add(f"{name}.sure", bins, sure)
            self._add(f"{name}.right", bins, right)
        self._keep_example(student, teacher, top_s, top_t, token_ids)

    def _add(self, name: str, bins: Tensor, values: Tensor) -> None:
        self._sums[name].index_add_(0, bins, values)

    def _keep_example(self, student: Tensor, teacher: Tensor, top_s: Tensor, top_t: Tensor, token_ids: Tensor) -> None:
        """Keep the flips that full precision was most sure of, one of a sequence."""
        given_up = teacher.amax(-1).exp() - teacher.gather(1, top_s[:, None])[:, 0].exp()
        worst = int(given_up.argmax())
        if top_s[worst] == top_t[worst]:
            return
        top = {"full_precision": int(top_t[worst]), "quantized": int(top_s[worst])}
        example = {
            "context": token_ids[max(0, worst + 1 - _CONTEXT) : worst + 1].tolist(),
            "position": worst,
            "top": top,
            "probability": {
                model: {of: float(log_p[worst, token].exp()) for of, token in top.items()}
                for model, log_p in (("full_precision", teacher), ("quantized", student))
            },
        }
        self._seen += 1  # ties are told apart by it
        heapq.heappush(self._examples, (float(given_up[worst]), -self._seen, example))
        if len(self._examples) > _EXAMPLES:
            heapq.heappop(self._examples)

    def result(self, ranks: Ranks) -> dict[str, Any]:
        """Return all counts, over all ranks, as JSON values, with the examples of this rank."""
        found: dict[str, Any] = {name: ranks.total(*values.tolist()) for name, values in self._sums.items()}
        found["margin.width"] = _MARGIN_WIDTH
        found["examples"] = [example for _, _, example in sorted(self._examples, reverse=True)]
        return found
