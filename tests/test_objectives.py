"""The contract of every registered objective."""

import pytest
import torch

from lfq_lightning.head import Head
from lfq_lightning.objectives import OBJECTIVES


@pytest.fixture(params=OBJECTIVES.names())
def objective(request):
    return OBJECTIVES.parse(request.param).build()


def sample(objective):
    torch.manual_seed(0)
    head = Head(torch.nn.LayerNorm(6), torch.randn(11, 6)) if objective.logit_space else None
    read = head.readout if head else (lambda hidden: hidden)
    teacher = torch.randn(2, 5, 6)
    student = (teacher + 0.2 * torch.randn(2, 5, 6)).requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    target = objective.target(read(teacher).flatten(0, 1), head)
    target = {name: value.unflatten(0, (2, 5)) for name, value in target.items()} | {"hidden": teacher}
    return read, student, teacher, target, mask, head


def test_loss_is_the_mean_over_unmasked_tokens(objective):
    read, student, _, target, mask, head = sample(objective)
    loss = objective.loss(read(student), target, mask, head)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    each = objective.token_loss(read(student)[mask], {name: value[mask] for name, value in target.items()}, head)
    assert each.shape == (7,)
    assert torch.allclose(loss, each.mean())


def test_pads_do_not_matter(objective):
    read, student, _, target, mask, head = sample(objective)
    loss = objective.loss(read(student), target, mask, head)
    loss.backward()
    assert student.grad[~mask].abs().max() == 0
    assert student.grad[mask].abs().min(dim=-1).values.max() > 0
    noisy = torch.where(mask[..., None], student, 1e3)
    assert torch.equal(objective.loss(read(noisy), target, mask, head), loss)


def test_the_teacher_itself_is_a_minimum(objective):
    read, _, teacher, target, mask, head = sample(objective)
    teacher = teacher.clone().requires_grad_()
    loss = objective.loss(read(teacher), target, mask, head)
    loss.backward()
    assert teacher.grad.abs().max() < 1e-5
    worse = objective.loss(read(teacher + 0.1 * torch.randn_like(teacher)), target, mask, head)
    assert worse > loss
