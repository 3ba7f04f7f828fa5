"""Held-out metrics against a token-by-token loop in Python."""

import math

import pytest
import torch

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.evaluation.held_out import evaluate
from lfq_lightning.models.head import Head
from lfq_lightning.token_set import TokenSet


def test_against_a_loop():
    torch.manual_seed(0)
    n, t, d, v = 3, 6, 4, 9
    student, teacher, weight = torch.randn(n, t, d), torch.randn(n, t, d), torch.randn(v, d)
    input_ids = torch.randint(0, v, (n, t))
    mask = torch.ones(n, t, dtype=torch.bool)
    mask[1, 4:] = False
    kl, agree, flips, nll, nll_fp = [], [], [], [], []
    for i in range(n):
        for j in range(t):
            if not mask[i, j]:
                continue
            q, p = ((h[i, j].double() @ weight.double().T).softmax(-1).tolist() for h in (student, teacher))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            agree.append(q.index(max(q)) == p.index(max(p)))
            if j + 1 < t and mask[i, j + 1]:
                label = int(input_ids[i, j + 1])
                flips.append((q.index(max(q)) == label) != (p.index(max(p)) == label))
                nll.append(-math.log(q[label]))
                nll_fp.append(-math.log(p[label]))
    head, tokens = Head(torch.nn.Identity(), weight), TokenSet(input_ids, mask)
    values, per_sequence = evaluate({"it": student}, teacher, head, tokens, Ranks(torch.device("cpu")))["it"]
    assert values["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert values["top1_agreement"] == pytest.approx(sum(agree) / len(agree))
    assert values["flip_rate"] == pytest.approx(sum(flips) / len(flips))
    assert values["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert values["perplexity_fp"] == pytest.approx(math.exp(sum(nll_fp) / len(nll_fp)), rel=1e-4)
    assert per_sequence["kl"] == pytest.approx([sum(kl[:6]) / 6, sum(kl[6:10]) / 4, sum(kl[10:]) / 6], rel=1e-4)
