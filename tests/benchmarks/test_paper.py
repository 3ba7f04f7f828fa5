"""The paper's runs: every file is used, plans are what their names say, the table takes what a run measures."""

import pytest

from benchmarks import paper
from lfq_lightning.plan import Plan, Rule
from lfq_lightning.run import read_config

METHODS, MODELS = paper.names("method"), paper.names("model")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_its_name_says(method):
    config = read_config(["run", *paper.configs(MODELS[0], method), "--output", "none"])
    rules = [Rule(**rule.as_dict()) for rule in config.plan]
    Plan(rules)
    assert rules[-1].match == "all" and rules[-1].objective == "mse"
    name, *rest = method.replace("block-ap", "block_ap").replace("logit-mse", "logit_mse").split("-")
    objective = {"lfq": "logit_ce", "logit_mse": "logit_mse"}.get(rest[0], "mse")
    assert rules[0].objective == objective and len(rules) == 1 + (objective != "mse")
    for rule in rules:
        grid = {key: rule.quantizer.get(key, -1) for key in ("name", "bits", "group_size", "symmetric")}
        bits, group = {"w4": (4, -1), "w3g128": (3, 128)}[rest[-1]]
        assert grid == {"name": name, "bits": bits, "group_size": group, "symmetric": False}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_fits_one_card(model):
    assert paper.plan_of(model, "flexround-lfq-w3g128").device_peak < 80e9


def test_published_numbers_have_their_files():
    for entry in paper.published():
        assert entry["model"] in MODELS
        for benchmark in entry["benchmarks"]:
            assert set(benchmark["published"]) <= {paper.REFERENCE, *METHODS}


def test_the_table_takes_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "paper.csv")
    monkeypatch.setattr(paper, "DOCUMENT", tmp_path / "reproduce.md")
    paper.DOCUMENT.write_text(f"before\n{paper.BEGIN}\nold\n{paper.END}\nafter")
    row = dict(zip(paper.COLUMNS, ["l1-qwen-7b-max", "flexround-w4", "AIME'24, greedy", *"?????"], strict=False))
    paper._keep({**row, "value": "1"})
    paper._keep({**row, "value": "28.5", "stderr": "2.0", "gpu": "H100"})
    paper.write_table()
    text = paper.DOCUMENT.read_text()
    assert "| AIME'24, greedy | flexround-w4 | 30.0 | 28.5 ± 2.0 (H100) |" in text
    assert text.startswith("before") and text.endswith("after") and "old" not in text
