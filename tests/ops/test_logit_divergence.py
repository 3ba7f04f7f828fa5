"""The objectives on whole rows of logits, against autograd of the textbook formula in fp64."""

import pytest
import torch

from lfq_lightning.errors import UserError
from lfq_lightning.models.head import Head
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.ops.logit_divergence import logit_divergence

M, D, V = 37, 6, 101


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def with_bucket(p, index):
    top = p.gather(-1, index)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)


def topk_kl(p, q, k):
    index = p.topk(k, -1).indices
    return kl(with_bucket(p, index), with_bucket(q, index))


TEXTBOOK = {
    ("kl",): lambda p, q, zp, zq: kl(p, q),
    ("reverse_kl",): lambda p, q, zp, zq: kl(q, p),
    ("js",): lambda p, q, zp, zq: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    ("js", ("beta", 0.2)): lambda p, q, zp, zq: 0.2 * kl(p, 0.2 * p + 0.8 * q) + 0.8 * kl(q, 0.2 * p + 0.8 * q),
    ("topk_kl", ("k", 5)): lambda p, q, zp, zq: topk_kl(p, q, 5),
    ("topk_kl", ("k", 1000)): lambda p, q, zp, zq: kl(p, q),
    ("logit_mse",): lambda p, q, zp, zq: (zp - zq).square().mean(-1),
    ("logit_ce",): lambda p, q, zp, zq: -(p * q.log()).sum(-1),
    ("logit_ce", ("temperature", 2.0)): lambda p, q, zp, zq: (
        -4 * ((zp / 2).softmax(-1) * (zq / 2).log_softmax(-1)).sum(-1)
    ),
    ("kl", ("temperature", 0.5)): lambda p, q, zp, zq: kl((zp * 2).softmax(-1), (zq * 2).softmax(-1)) / 4,
    ("reverse_kl", ("temperature", 2.0)): lambda p, q, zp, zq: 4 * kl((zq / 2).softmax(-1), (zp / 2).softmax(-1)),
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", TEXTBOOK, ids=str)
def test_value_and_gradient(case, bias, softcap):
    torch.manual_seed(0)
    weight, offset = torch.randn(V, D), torch.randn(V) if bias else None
    teacher = torch.randn(M, D)
    student = (teacher + 0.3 * torch.randn(M, D)).requires_grad_()
    head = Head(torch.nn.Identity(), weight, offset, softcap=softcap)
    objective = OBJECTIVES.parse({"name": case[0], **dict(case[1:])}).build()
    loss = objective.token_loss(head.readout(student), objective.target(head.readout(teacher), head), head)
    upstream = torch.linspace(0.5, 2, M)
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), student)

    exact = student.detach().double().requires_grad_()
    zq, zp = (h @ weight.double().T + (offset.double() if bias else 0) for h in (exact, teacher.double()))
    if softcap:
        zq, zp = (softcap * (z / softcap).tanh() for z in (zq, zp))
    expected = TEXTBOOK[case](zp.softmax(-1), zq.softmax(-1), zp, zq)
    (expected_gradient,) = torch.autograd.grad((expected * upstream.double()).sum(), exact)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert (gradient.double() - expected_gradient).norm() <= 2e-5 * expected_gradient.norm()


def test_chunks_do_not_change_the_value():
    torch.manual_seed(1)
    hidden, teacher, weight = torch.randn(M, D), torch.randn(M, D), torch.randn(V, D)

    def square(student_logits, teacher_logits):
        return (student_logits - teacher_logits).square().sum(-1)

    whole = logit_divergence(hidden, teacher, weight, square)
    for tokens in (1, 5, 36, 37, 1000):
        assert torch.allclose(logit_divergence(hidden, teacher, weight, square, tokens), whole, rtol=1e-6)


def test_likely_tokens_far_apart_stay_finite():
    weight = torch.eye(5) * 200
    hidden, teacher = torch.eye(5)[:2], torch.eye(5)[1:3]
    for name in ("reverse_kl", "js", "topk_kl", {"name": "topk_kl", "k": 2}, "kl"):
        objective, head = OBJECTIVES.parse(name).build(), Head(torch.nn.Identity(), weight)
        h = hidden.clone().requires_grad_()
        objective.token_loss(h, objective.target(teacher, head), head).sum().backward()
        assert bool(h.grad.isfinite().all()), name


@pytest.mark.parametrize(("name", "option"), [("js", {"beta": 1}), ("topk_kl", {"k": 0}), ("kl", {"temperature": 0.0})])
def test_options_out_of_range(name, option):
    with pytest.raises(UserError, match=f"objective {name}"):
        OBJECTIVES.parse({"name": name, **option}).build()
