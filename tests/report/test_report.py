"""report.html: its numbers are the run's, it needs nothing from elsewhere; token profiles against a plain loop."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from lfq_lightning.cli import main
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.evaluation.token_profile import TokenProfile
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.report.chart import Line, bar_chart, line_chart, ticks
from lfq_lightning.report.weight_statistics import weight_statistics
from tests.helpers import fails, run, save_tiny

VOID = {"meta", "line", "polyline", "br", "link"}


class Page(HTMLParser):
    """Checks that every tag that opens closes, and collects the text and what the page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.fetched = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def test_a_run_writes_its_page(config):
    path = config()
    run(path)
    folder = path.parent / "run"
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.fetched == [] and "<script" not in text and "url(" not in text
    metrics = json.loads((folder / "metrics.json").read_text())
    for which in ("full_precision", "before_last_training", "quantized"):
        assert f"{metrics[which]['held_out']['kl']:.4f}" in page.words
        assert f"{metrics[which]['held_out']['perplexity']:.2f}" in page.words
    assert text.count("<svg") == 12 and "nan" not in re.sub(r"<style.*?</style>", "", text, flags=re.S).lower()
    assert sum(metrics["profile"]["position.count"]) == sum(metrics["profile"]["margin.count"])
    before = text
    main(["report", str(folder)])
    assert (folder / "report.html").read_text() == before


def test_runs_side_by_side(config, tmp_path, capsys):
    run(config())
    run(config(), "--output", str(tmp_path / "other <b>"), "--seed_everything", "8")
    page = tmp_path / "all.html"
    main(["report", str(tmp_path / "run"), str(tmp_path / "other <b>"), str(tmp_path / "run"), "--output", str(page)])
    words = Page(page.read_text()).words
    assert "3 runs side by side" in words
    assert "run (3)" in words and "other <b>" in words
    assert any("other <b> was measured on other tokens than run" in word for word in words)
    assert any("run (3) against run: KL by +0.0000" in word for word in words)
    assert "give the output of `lfq run`" in fails(capsys, "report", str(tmp_path))


def test_an_evaluation_is_on_the_page(config, tmp_path):
    run(config())
    folder = tmp_path / "run"
    main(["eval", str(folder), "--new-tokens", "3"])
    main(["report", str(folder)])
    assert "greedy answers" in Page((folder / "report.html").read_text()).words
    run(config(), "--overwrite", "true")
    assert not (folder / "evaluation").exists()


def test_token_profile_is_a_plain_loop():
    torch.manual_seed(0)
    vocabulary, length, seq_len = 50, 20, 24
    student, teacher = (torch.randn(length, vocabulary).mul(2).log_softmax(-1) for _ in range(2))
    ids, following = torch.randint(vocabulary, (2, length))
    following[-1] = -1
    frequency = torch.randint(0, 6, (vocabulary,))
    profile = TokenProfile(frequency)
    profile.update(student, teacher, ids, following, seq_len)
    found = profile.result(Ranks(torch.device("cpu")))
    position, often, confidence = [0.0] * 16, [0.0] * 12, [[0.0] * 10 for _ in range(3)]
    for t in range(length):
        s, top = int(student[t].argmax()), int(teacher[t].argmax())
        position[t * 16 // seq_len] += s != top
        often[int(frequency[top]).bit_length()] += s != top
        sure = float(student[t].max().exp())
        if following[t] >= 0:
            for column, value in zip(confidence, (1.0, sure, float(s == following[t])), strict=True):
                column[int(sure * 10)] += value
    assert found["position.flips"] == position and found["frequency.flips"] == often
    for name, column in zip(("count", "sure", "right"), confidence, strict=True):
        assert found[f"confidence.{name}"] == pytest.approx(column, rel=1e-6)
    (example,) = found["examples"]
    worst = max(range(length), key=lambda t: teacher[t].max().exp() - teacher[t, student[t].argmax()].exp())
    assert example["position"] == worst and example["context"] == ids[: worst + 1].tolist()
    assert example["probability"]["quantized"]["full_precision"] == pytest.approx(
        float(student[worst, teacher[worst].argmax()].exp())
    )


def test_equal_sequences_are_no_trouble():
    torch.manual_seed(1)
    student, teacher = (torch.randn(4, 9).log_softmax(-1) for _ in range(2))
    profile = TokenProfile(torch.zeros(9, dtype=torch.int64))
    for _ in range(40):
        profile.update(student, teacher, torch.arange(4), torch.full((4,), -1), 4)
    assert len(profile.result(Ranks(torch.device("cpu")))["examples"]) == 12


def test_weight_statistics_by_hand():
    codes = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 1]], dtype=torch.uint8)
    scale = torch.tensor([[[1.0], [-2.0]], [[3.0], [4.0]]])
    zero = torch.full_like(scale, 2, dtype=torch.uint8)
    found = weight_statistics(QuantizedTensor(codes, scale, zero, IntegerGrid(2, 2, True)))
    assert found["at_ends"] == 0.5 and found["scale_p50"] == 2.5
    assert found["scale_p05"] == pytest.approx(1.15) and found["scale_p95"] == pytest.approx(3.85)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.0137), (3.2, 977.0), (-4.0, 4.0), (0.0, 31.0)])
def test_ticks_are_round_and_span(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 9 and found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    steps = {round(b - a, 12) for a, b in pairwise(found)}
    assert len(steps) == 1


def test_charts_of_little():
    assert line_chart([Line("none", [], 0)], "x", "y") == "" == bar_chart([], [], "x", "y")
    one = line_chart([Line("a & b", [(0.0, 2.0)], 0), Line("c", [(0.0, float("nan"))], 1)], "x", "y")
    assert "a &amp; b" in one and one.count("<circle") == 1
    assert "nan" not in line_chart([Line("a", [(0.0, 0.0), (1.0, 3.0)], 0)], "x", "y", log_y=True)


@pytest.mark.parametrize(
    ("grid", "said", "loading"),
    [
        ("q4_0", "q4_0 in 21 layers", "for llama.cpp"),
        ("nvfp4", "nvfp4, 4 bits in groups of 16", "AutoModelForCausalLM"),
        ({"name": "affine", "bits": 3, "group_size": 32}, "affine, 3 bits in groups of 32", "mlx_lm.generate"),
    ],
    ids=str,
)
def test_grids_are_named(grid, said, loading, config, tmp_path):
    model = save_tiny(tmp_path / "model", intermediate_size=64)
    plan = [{"match": "all", "quantizer": {"name": "rtn", "grid": grid}}]
    main(["run", "--config", str(config(model={"checkpoint": str(model)}, plan=plan))])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert said in page and loading in page
    assert "Where the bytes went" in page and "KL against size" not in page
