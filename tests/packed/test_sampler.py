"""Choosing tokens: the distribution that transformers draws from, by the same tokens whoever runs the model."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lfq_lightning.errors import UserError
from lfq_lightning.packed.decoder import Decoder
from lfq_lightning.packed.generate import Writer
from lfq_lightning.packed.load_model import load
from lfq_lightning.packed.sampler import Sampler
from tests.helpers import run

DRAWS = 40_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (2.5, 0.5), (0.3, 1e-6)])
def test_draws_have_the_distribution_that_transformers_would_draw_from(dtype, temperature, top_p):
    torch.manual_seed(5)
    logits = (2 * torch.randn(1, 37)).to(dtype)
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits.double())).softmax(-1)[0]
    drawn = Sampler(temperature, top_p)(logits.expand(DRAWS, -1))
    assert drawn.shape == (DRAWS, 1) and drawn.dtype == torch.int64
    share = drawn.flatten().bincount(minlength=37).double() / DRAWS
    assert bool((share[expected == 0] == 0).all())
    assert bool(((share - expected).abs() <= 4.5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-9).all())


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([[[0.0, 3.0, 1.0]], [[2.0, -1.0, 1.0]]])
    assert Sampler()(logits).tolist() == [[[1]], [[0]]]


def test_a_decoder_and_generate_draw_the_same_tokens(config):
    path = config()
    run(path)
    model, _ = load(path.parent / "run")
    prompt, sampler = torch.tensor([[7, 50, 3, 100, 9]]), Sampler(0.9, 0.95)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(Writer(model, sampler).write(prompt, 20, set(), None))
    torch.manual_seed(1)
    answers.append(list(Decoder(model, 32, graph=False, sampler=sampler).answer(prompt, 20, set())))
    greedy = Writer(model).write(prompt, 20, set(), None)
    assert answers[0] == answers[1] == answers[3]
    assert answers[0] != answers[2] and greedy not in answers


@pytest.mark.parametrize(
    ("temperature", "top_p", "message"),
    [
        (-1.0, 1.0, "must be 0"),
        (float("nan"), 1.0, "must be 0"),
        (1.0, 0.0, "above 0"),
        (1.0, 1.5, "at most 1"),
        (0.0, 0.9, "give a temperature"),
    ],
)
def test_refusals(temperature, top_p, message):
    with pytest.raises(UserError, match=message):
        Sampler(temperature, top_p)
