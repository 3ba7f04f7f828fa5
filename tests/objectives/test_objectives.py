"""The contract of every registered objective."""

import pytest
import torch

from lfq_lightning.errors import UserError
from lfq_lightning.models.head import Head
from lfq_lightning.objectives import OBJECTIVES, Objective
from lfq_lightning.objectives.weighted_sum import WeightedSum
from lfq_lightning.ops.linear_soft_ce import reference as linear_soft_ce
from lfq_lightning.ops.logit_divergence import reference as logit_divergence
from lfq_lightning.token_set import NO_NEXT

VARIANTS = [
    *OBJECTIVES.names(),
    {"name": "mse", "normalised": True},
    {"name": "mse", "massive": 2.5},
    {"name": "logit_ce", "temperature": 2.0},
    {"name": "kl", "temperature": 0.5},
    {"name": "js", "beta": 0.2},
    {"name": "topk_kl", "k": 3},
]


@pytest.fixture(params=[*VARIANTS, "sum"], ids=str)
def objective(request):
    if request.param == "sum":
        return WeightedSum(terms=((OBJECTIVES.parse("mse"), 0.5), (OBJECTIVES.parse("logit_ce"), 2.0)))
    return OBJECTIVES.parse(request.param).build()


def sample(objective, softcap=None):
    torch.manual_seed(0)
    head = Head(torch.nn.LayerNorm(6), torch.randn(11, 6), softcap=softcap) if objective.logit_space else None

    def read(hidden):
        return objective.view(hidden, head)

    teacher = torch.randn(2, 5, 6)
    student = (teacher + 0.2 * torch.randn(2, 5, 6)).requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    target = objective.target(read(teacher).flatten(0, 1), head)
    target = {name: value.unflatten(0, (2, 5)) for name, value in target.items()} | {"hidden": teacher}
    target["next_token"] = torch.randint(0, 11, (2, 5))
    return read, student, teacher, target, mask, head


def mean_loss(objective, hidden, target, mask, head):
    return objective.loss(hidden, target, mask.flatten().nonzero()[:, 0], head)


def test_loss_is_the_mean_over_unmasked_tokens(objective):
    read, student, _, target, mask, head = sample(objective)
    loss = mean_loss(objective, student, target, mask, head)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    each = objective.token_loss(read(student)[mask], {name: value[mask] for name, value in target.items()}, head)
    assert each.shape == (7,)
    assert torch.allclose(loss, each.mean())


def test_pads_do_not_matter(objective):
    _, student, _, target, mask, head = sample(objective)
    loss = mean_loss(objective, student, target, mask, head)
    loss.backward()
    assert student.grad[~mask].abs().max() == 0
    assert student.grad[mask].abs().min(dim=-1).values.max() > 0
    noisy = torch.where(mask[..., None], student, 1e3)
    assert torch.equal(mean_loss(objective, noisy, target, mask, head), loss)
    for name, value in target.items():
        kept = mask.view(*mask.shape, *[1] * (value.dim() - 2))
        other = torch.where(kept, value, 7 if name == "next_token" else 1e3)
        assert torch.equal(mean_loss(objective, student, {**target, name: other}, mask, head), loss), name


def test_the_teacher_itself_is_a_minimum(objective):
    if not objective.matches_teacher:
        pytest.skip("an ablation without the teacher")
    _, _, teacher, target, mask, head = sample(objective)
    teacher = teacher.clone().requires_grad_()
    loss = mean_loss(objective, teacher, target, mask, head)
    loss.backward()
    assert teacher.grad.abs().max() < 1e-5
    worse = mean_loss(objective, teacher + 0.1 * torch.randn_like(teacher), target, mask, head)
    assert worse > loss


def test_two_halves_average_to_the_whole(objective):
    _, student, _, target, _, head = sample(objective)
    everything = torch.ones(2, 5, dtype=torch.bool)
    whole = mean_loss(objective, student, target, everything, head)
    halves = [
        mean_loss(
            objective, student[part], {name: value[part] for name, value in target.items()}, everything[part], head
        )
        for part in (slice(0, 1), slice(1, 2))
    ]
    assert torch.allclose(whole, (halves[0] + halves[1]) / 2, rtol=1e-5)


def test_finite_in_bf16(objective):
    _, student, teacher, target, mask, head = sample(objective)
    head = Head(torch.nn.LayerNorm(6), torch.randn(11, 6).bfloat16()) if head else None
    teacher = (30 * teacher).bfloat16()
    target = objective.target(objective.view(teacher.flatten(0, 1).float(), head), head)
    target = {name: value.unflatten(0, (2, 5)) for name, value in target.items()}
    target |= {"hidden": teacher, "next_token": torch.zeros(2, 5, dtype=torch.int64)}
    student = (30 * student.detach()).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mean_loss(objective, student, target, mask, head)
    loss.backward()
    assert bool(loss.isfinite()) and bool(student.grad.isfinite().all())


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(objective, softcap):
    if softcap is not None and (objective.linear_head_only or not objective.logit_space):
        pytest.skip("not for a soft-capped head" if objective.linear_head_only else "no head")
    read, student, teacher, target, _, head = sample(objective, softcap)
    if head is not None:
        head.double()
    kept = objective.target(read(teacher.double()).flatten(0, 1), head)
    kept |= {"hidden": teacher.double().flatten(0, 1), "next_token": target["next_token"].flatten()}
    rows = student.detach().double().flatten(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: objective.token_loss(read(h), kept, head), (rows,))


def test_sizes_of_chunks_do_not_change_value_or_gradient(objective, monkeypatch):
    """More tokens than a chunk, words that no chunk divides; the GPU's tiles are its kernels' tests'."""
    torch.manual_seed(1)
    head = Head(torch.nn.LayerNorm(6), torch.randn(101, 6)) if objective.logit_space else None
    teacher = torch.randn(50, 6)
    student = (teacher + 0.2 * torch.randn(50, 6)).requires_grad_()

    def run():
        if head is not None:
            vars(head).pop("gram", None)  # cached
        kept = objective.target(objective.view(teacher, head), head)
        kept |= {"hidden": teacher, "next_token": torch.arange(50)}
        loss = objective.token_loss(objective.view(student, head), kept, head)
        return loss, torch.autograd.grad(loss.sum(), student)[0]

    whole = run()
    for tokens, words in ((7, 5), (64, 300), (1, 1)):
        monkeypatch.setattr(linear_soft_ce, "_TILE_TOKENS", tokens)
        monkeypatch.setattr(linear_soft_ce, "_TILE_LOGITS", tokens * words)
        monkeypatch.setattr(logit_divergence, "_CHUNK_LOGITS", tokens * 101)
        monkeypatch.setattr("lfq_lightning.models.head._GRAM_ROWS", words)
        for value, expected in zip(run(), whole, strict=True):
            assert torch.allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_a_weighted_sum_is_the_sum():
    terms = [(OBJECTIVES.parse("mse"), 0.5), (OBJECTIVES.parse("logit_ce"), 2.0), (OBJECTIVES.parse("kl"), 1.0)]
    together = WeightedSum(terms=tuple(terms))
    assert together.logit_space
    _, student, teacher, target, mask, head = sample(together)
    expected = torch.zeros(())
    for plugin, weight in terms:
        alone = plugin.build()
        own_head = head if alone.logit_space else None
        own = alone.target(alone.view(teacher.flatten(0, 1), own_head), own_head)
        own = {name: value.unflatten(0, (2, 5)) for name, value in own.items()} | {"hidden": teacher}
        expected = expected + weight * mean_loss(alone, student, own, mask, own_head)
    assert torch.allclose(mean_loss(together, student, target, mask, head), expected, rtol=1e-6)


def test_mse_of_massive_tokens():
    teacher = torch.randn(3, 50)
    teacher[1, 7] = 500.0
    student = teacher + 1.0
    target = {"hidden": teacher}
    assert torch.allclose(OBJECTIVES.parse("mse").build().token_loss(student, target, None), torch.ones(3), rtol=1e-4)
    trimmed = OBJECTIVES.parse({"name": "mse", "massive": 100.0}).build().token_loss(student, target, None)
    assert trimmed[1] == 0 and bool((trimmed[[0, 2]] > 0.99).all())
    normalised = OBJECTIVES.parse({"name": "mse", "normalised": True}).build().token_loss(student, target, None)
    assert torch.allclose(normalised, 1 / teacher.square().mean(-1), rtol=1e-4)
    with pytest.raises(UserError, match="massive"):
        OBJECTIVES.parse({"name": "mse", "massive": 0.5}).build()


def test_hard_ce_is_cross_entropy_with_the_text():
    objective = OBJECTIVES.parse("hard_ce").build()
    _, student, _, target, mask, head = sample(objective)
    target["next_token"][0, 4] = NO_NEXT
    logits = head.logits(head.readout(student.detach()[mask])).double()
    label = target["next_token"][mask]
    known = torch.nn.functional.cross_entropy(logits, label, ignore_index=NO_NEXT, reduction="none")
    assert torch.allclose(mean_loss(objective, student, target, mask, head).double(), known.mean(), rtol=1e-5)


@pytest.mark.parametrize("wrong", [torch.zeros(()), torch.zeros(7, 1), 0.0])
def test_a_loss_of_the_wrong_shape_is_named(wrong):
    class Wrong(Objective):
        """Wrong."""

        def token_loss(self, hidden, target, head):
            return wrong

    _, student, _, target, mask, head = sample(OBJECTIVES.parse("mse").build())
    with pytest.raises(UserError, match="for 7 tokens; return one loss per token"):
        mean_loss(Wrong(), student, target, mask, head)
