"""Objectives through the head of each family, against fp64 autograd of the real model's own logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.objectives import OBJECTIVES

TEXTBOOK = {
    "logit_ce": lambda zp, zq: -(zp.softmax(-1) * zq.log_softmax(-1)).sum(-1),
    "kl": lambda zp, zq: (zp.softmax(-1) * (zp.log_softmax(-1) - zq.log_softmax(-1))).sum(-1),
    "reverse_kl": lambda zp, zq: (zq.softmax(-1) * (zq.log_softmax(-1) - zp.log_softmax(-1))).sum(-1),
    "logit_mse": lambda zp, zq: (zp - zq).square().mean(-1),
    "js": lambda zp, zq: sum(
        0.5 * (z.softmax(-1) * (z.log_softmax(-1) - ((zp.softmax(-1) + zq.softmax(-1)) / 2).log())).sum(-1)
        for z in (zp, zq)
    ),
    "topk_kl": lambda zp, zq: top_kl(zp.log_softmax(-1), zq.log_softmax(-1), zp.topk(64, -1).indices),
    "hard_ce": lambda zp, zq: -zq.log_softmax(-1)[..., 5],
}


def top_kl(log_p, log_q, index):
    p, q = (
        torch.cat([z.exp().gather(-1, index), z.exp().scatter(-1, index, 0).sum(-1, True)], -1) for z in (log_p, log_q)
    )
    return (p * (p / q).log()).sum(-1)


def real_logits(model, hidden):
    """The model's own path from the last block's outputs to logits: its decoder is replaced by its norm."""

    class OnlyNorm(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, **_):
            from transformers.modeling_outputs import MoeModelOutputWithPast  # what mixtures look into

            return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden))

    norm = model.model.final_layernorm if model.config.model_type == "phi" else model.model.norm
    decoder, model.model = model.model, OnlyNorm(norm)
    try:
        return model(input_ids=torch.zeros(1, hidden.shape[1], dtype=torch.int64)).logits
    finally:
        model.model = decoder


@pytest.mark.parametrize("name", TEXTBOOK)
def test_against_the_model(family_folder, name):
    skeleton = ModelSkeleton(open_checkpoint(str(family_folder)))
    head, objective = skeleton.head(torch.float32), OBJECTIVES.parse(name).build()
    if head.softcap is not None and objective.linear_head_only:
        pytest.skip("not for a soft-capped head")
    torch.manual_seed(0)
    teacher = torch.randn(1, 9, 32)
    student = (teacher + 0.3 * torch.randn(1, 9, 32)).requires_grad_()
    target = objective.target(objective.view(teacher[0], head), head) | {"next_token": torch.full((9,), 5)}
    losses = objective.token_loss(objective.view(student[0], head), target, head)
    (gradient,) = torch.autograd.grad(losses.sum(), student)

    model = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float64)
    exact = student.detach().double().requires_grad_()
    expected = TEXTBOOK[name](real_logits(model, teacher.double()), real_logits(model, exact))[0]
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert torch.allclose(losses.double(), expected, rtol=1e-4, atol=2e-5)
    assert (gradient.double() - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()
