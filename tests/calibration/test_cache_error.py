"""The error of keys and values, against a computation by hand."""

import json

import pytest
import torch

from lfq_lightning.calibration.cache_error import CacheError
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from tests.helpers import run, save_tiny

MASKS = [torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), torch.ones(1, 5, dtype=torch.bool)]


@pytest.fixture
def skeleton(tmp_path):
    return ModelSkeleton(open_checkpoint(save_tiny(tmp_path)))


@pytest.fixture
def block(skeleton, batches):  # a block knows its arguments once tokens were embedded
    return skeleton.block(range(1))


@pytest.fixture
def batches(skeleton):
    torch.manual_seed(0)
    return [torch.cat([skeleton.embed(torch.randint(100, (1, 5))) for _ in mask]) for mask in MASKS]


def measured(block, batches, change):
    """Return the error after `change`, and what keys and values were before and after it, pads removed."""
    noted = []
    layers = [block.linears()[f"model.layers.0.self_attn.{name}_proj"] for name in "kv"]
    hooks = [layer.register_forward_hook(lambda m, a, output: noted.append(output)) for layer in layers]
    error, found = CacheError(block, Ranks(torch.device("cpu"))), {}
    with torch.no_grad():
        with error.noting_teacher():
            for batch in batches:
                block(batch)
        change(layers)
        with error.comparing_student(MASKS, found):
            for batch in batches:
                block(batch)
    for hook in hooks:
        hook.remove()
    half = len(noted) // 2
    sides = [
        {
            kind: torch.cat([out[mask] for out, mask in zip(part[start::2], MASKS, strict=True)]).double()
            for start, kind in enumerate(("keys", "values"))
        }
        for part in (noted[:half], noted[half:])
    ]
    return found, *sides


def test_against_least_squares_by_channel(block, batches):
    def noise(layers):
        for layer in layers:
            layer.weight.add_(0.3 * layer.weight.std() * torch.randn_like(layer.weight))

    found, before, after = measured(block, batches, noise)
    for kind in ("keys", "values"):
        left = total = 0.0
        for wanted, got in zip(before[kind].T, after[kind].T, strict=True):
            factor = torch.linalg.lstsq(got[:, None], wanted[:, None]).solution
            left += float((wanted - got * factor[0]).square().sum())
            total += float(wanted.square().sum())
        assert found[kind] == pytest.approx(left / total, rel=1e-6)
        assert 0.01 < found[kind] < 0.5


def test_factors_of_channels_are_no_error(block, batches):
    def scale(layers):
        for layer in layers:
            layer.weight.mul_(torch.linspace(0.5, 2, len(layer.weight))[:, None])

    found, _, _ = measured(block, batches, scale)
    assert found["keys"] < 1e-9
    assert found["values"] < 1e-9


def test_layers_without_a_row_for_each_token_are_left_out(block, batches):
    key = block.linears()["model.layers.0.self_attn.k_proj"]
    forward = key.forward
    key.forward = lambda rows: forward(rows) + 0 * key(rows[:, :1]) if rows.shape[1] > 1 else forward(rows)
    error, found = CacheError(block, Ranks(torch.device("cpu"))), {}
    with torch.no_grad():
        for noting in (error.noting_teacher(), error.comparing_student(MASKS, found)):
            with noting:
                for batch in batches:
                    block(batch)
    assert set(found) == {"values"}


def test_the_journal_has_it_for_each_block(config):
    path = config()
    run(path)
    lines = [json.loads(line) for line in (path.parent / "run" / "journal.jsonl").read_text().splitlines()]
    assert all(set(line["cache_error"]) == {"keys", "values"} for line in lines)
    assert all(0 < error < 1 for line in lines for error in line["cache_error"].values())
    assert "Keys and values" in (path.parent / "run" / "report.html").read_text()
