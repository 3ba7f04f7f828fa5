"""The LFQ loss against autograd on the naive formula in fp64."""

import pytest
import torch

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.models.head import Head
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.ops.linear_soft_ce import covering, linear_soft_ce, logit_moment

SHAPES = [(1, 1, 2), (3, 5, 7), (63, 33, 1000), (513, 16, 4097), (1000, 100, 63)]


def naive(hidden, teacher, weight, bias=None, scale=1.0):
    """Soft cross-entropy and its hidden gradient by autograd, all in fp64."""
    hidden, teacher, weight = hidden.double().requires_grad_(), teacher.double(), weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    p = ((teacher @ weight.T) * scale + bias).softmax(-1)
    loss = -(p * ((hidden @ weight.T) * scale + bias).log_softmax(-1)).sum(-1)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    return loss.detach(), gradient, -(p * p.log()).sum(-1)


def sample(tokens, width, vocabulary):
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, width)
    return hidden, hidden + 0.3 * torch.randn(tokens, width), torch.randn(vocabulary, width)


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), SHAPES)
def test_loss_and_gradient(tokens, width, vocabulary):
    hidden, teacher, weight = sample(tokens, width, vocabulary)
    expected, gradient, _ = naive(hidden, teacher, weight)
    moment = logit_moment(teacher, weight)[1]
    without = linear_soft_ce(hidden, weight, moment)
    hidden.requires_grad_()
    loss = linear_soft_ce(hidden, weight, moment)
    loss.sum().backward()
    size = float(
        (hidden @ weight.T).detach().abs().max()
    )  # the loss is a difference of two numbers as large as the logits
    assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=1e-6 * size)
    assert torch.allclose(without.double(), expected, rtol=1e-5, atol=1e-6 * size)
    assert (hidden.grad.double() - gradient).norm() <= 1e-5 * gradient.norm()


def test_upstream_gradient_weighs_tokens():
    hidden, teacher, weight = sample(5, 4, 9)
    _, gradient, _ = naive(hidden, teacher, weight)
    hidden.requires_grad_()
    upstream = torch.arange(5.0)
    (linear_soft_ce(hidden, weight, logit_moment(teacher, weight)[1]) * upstream).sum().backward()
    assert torch.allclose(hidden.grad.double(), gradient * upstream[:, None].double(), rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, teacher, weight = sample(4, 8, 50)
    loss = linear_soft_ce(1e3 * hidden, weight, logit_moment(1e3 * teacher, weight)[1])
    expected, _, _ = naive(1e3 * hidden, 1e3 * teacher, weight)
    assert torch.allclose(loss.double(), expected, rtol=1e-4, atol=1e-1)


def test_bf16_head():
    hidden, teacher, weight = sample(64, 32, 500)
    weight = weight.bfloat16()
    moment = logit_moment(teacher, weight)[1]
    assert moment.dtype == torch.float32
    loss = linear_soft_ce(hidden, weight, moment)
    expected, _, _ = naive(hidden.bfloat16(), teacher.bfloat16(), weight)
    error = loss.double() - expected  # logits are of size 20, rounded to 8 bits
    assert error.abs().mean() < 0.06
    assert error.mean().abs() < 0.02


@pytest.mark.parametrize("name", ["logit_ce", "kl"])
def test_objectives_with_bias_and_scale(name):
    """A head bias and a logit scale are exact: against the naive formula of the real logits."""
    hidden, teacher, weight = sample(21, 6, 40)
    bias = torch.randn(40)
    head = Head(torch.nn.Identity(), weight, bias, logit_scale=0.5)
    objective = OBJECTIVES.get(name)()
    expected, gradient, entropy = naive(hidden, teacher, weight, bias, scale=0.5)
    expected = expected - entropy if name == "kl" else expected
    hidden.requires_grad_()
    loss = objective.token_loss(head.readout(hidden), objective.target(head.readout(teacher), head), head)
    loss.sum().backward()
    assert torch.allclose(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert (hidden.grad.double() - gradient).norm() <= 1e-5 * gradient.norm()


def test_kl_is_zero_at_a_perfect_match():
    hidden, _, weight = sample(30, 8, 100)
    head, objective = Head(torch.nn.Identity(), weight), OBJECTIVES.get("kl")()
    loss = objective.token_loss(hidden, objective.target(hidden, head), head)
    assert loss.abs().max() < 1e-5


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("words", [64, 2**14])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [*SHAPES[:3], (100, 63, 1025)])
def test_kernel(tokens, width, vocabulary, words, kernel_device, monkeypatch):
    kernel = pytest.importorskip("lfq_lightning.ops.linear_soft_ce.triton")
    monkeypatch.setattr(kernel, "CHUNK_VOCABULARY", words)
    monkeypatch.setattr(kernel, "_CHUNK_LOGITS", 50 * words)  # several chunks of tokens too
    hidden, _, weight = (t.to(kernel_device) for t in sample(tokens, width, vocabulary))
    logits = hidden.double() @ weight.double().T
    lse, moment = kernel.logit_moment(hidden, weight)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moment.double(), logits.softmax(-1) @ weight.double(), rtol=1e-4, atol=1e-5)
    torch.library.opcheck(kernel.logit_moment, (hidden[:2], weight[:9]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(63, 33, 1000), (1000, 100, 40000), (512, 1024, 128256)])
def test_kernel_in_half_precision(tokens, width, vocabulary):
    hidden, teacher, weight = (t.cuda().bfloat16() for t in sample(tokens, width, vocabulary))
    hidden, weight = hidden / width**0.5, weight
    expected, gradient, _ = naive(hidden, teacher / width**0.5, weight)
    hidden.requires_grad_()
    loss = linear_soft_ce(hidden, weight, logit_moment(teacher / width**0.5, weight)[1])
    loss.sum().backward()
    assert (loss.double() - expected).abs().mean() < 2e-3
    assert (hidden.grad.double() - gradient).norm() <= 2e-2 * gradient.norm()


def coarse(logits, kept):
    """The logits with all that are not kept as one, by hand in fp64."""
    others = torch.ones(logits.shape[1], dtype=torch.bool)
    others[kept] = False
    return torch.cat([logits[:, kept], logits[:, others].logsumexp(-1, keepdim=True)], 1)


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), SHAPES)
@pytest.mark.parametrize("name", ["logit_ce", "kl"])
def test_some_tokens_told_apart_and_the_others_as_one(tokens, width, vocabulary, name):
    hidden, teacher, weight = sample(tokens, width, vocabulary)
    weight = weight / width**0.5  # rests of less than 2^-23 are not told from it
    objective, head = OBJECTIVES.get(name)(coverage=0.5), Head(torch.nn.Identity(), weight)
    kept = covering([teacher], weight, 0.5)
    objective.prepare(lambda: iter([teacher]), head, Ranks(torch.device("cpu")))
    kept_of_teacher = objective.target(teacher, head)
    hidden.requires_grad_()
    loss = objective.token_loss(hidden, kept_of_teacher, head)
    loss.sum().backward()
    wide = hidden.detach().double().requires_grad_()
    p = coarse(teacher.double() @ weight.double().T, kept).log_softmax(-1)
    student = wide @ weight[kept].double().T
    rest = coarse(teacher.double() @ weight.double().T, kept)[:, -1:]
    q = torch.cat([student, rest], 1).log_softmax(-1)
    expected = (p.exp() * ((p if name == "kl" else 0) - q)).sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), wide)
    size = float((hidden @ weight.T).detach().abs().max())
    assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=5e-6 * size)
    assert (hidden.grad.double() - gradient).norm() <= 2e-5 * gradient.norm() + 1e-6 * size


def test_the_teacher_is_a_minimum_whatever_is_covered():
    _, teacher, weight = sample(63, 33, 1000)
    objective, head = OBJECTIVES.get("kl")(coverage=0.9), Head(torch.nn.Identity(), weight)
    objective.prepare(lambda: iter([teacher]), head, Ranks(torch.device("cpu")))
    target = objective.target(teacher, head)
    same = teacher.clone().requires_grad_()
    loss = objective.token_loss(same, target, head)
    loss.sum().backward()
    assert loss.abs().max() <= 1e-4
    assert same.grad.abs().max() <= 1e-4


@pytest.mark.parametrize("share", [0.1, 0.9, 0.999, 1.0])
def test_covering_takes_the_fewest_tokens_of_the_vocabulary(share):
    _, teacher, weight = sample(63, 33, 1000)
    kept = covering(teacher.split(10), weight, share)
    p = (teacher.double() @ weight.double().T).softmax(-1).mean(0)
    assert torch.equal(kept, kept.unique())
    assert float(p[kept].sum()) >= share - 1e-6
    assert float(p.sort(descending=True).values[: len(kept) - 1].sum()) < share
    assert torch.isin(p.topk(len(kept) - 1).indices, kept).all()


def test_coverage_is_a_share():
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="coverage"):
            OBJECTIVES.get("logit_ce")(coverage=wrong)
