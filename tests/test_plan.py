"""Rules: first match wins, and every mistake is named."""

import pytest

from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.families import Family
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import Plan, Rule
from tests.helpers import save_tiny

FLEXROUND = {"name": "flexround", "bits": 3, "group_size": 16, "init": "gptq"}


@pytest.fixture(scope="module")
def skeleton(llama):
    return ModelSkeleton(open_checkpoint(str(llama)))


def test_first_match_wins(skeleton):
    plans = Plan(
        [
            Rule("*.mlp.*", {"name": "rtn", "bits": 8}),
            Rule("last", FLEXROUND, objective="logit_ce", steps=5),
            Rule(0, "gptq"),
            Rule("model.layers.1.self_attn.[qk]_proj", {"name": "gptq", "bits": 2, "symmetric": False}),
        ]
    ).resolve(skeleton)
    names = {
        n.removeprefix("model.layers.2."): (p.closed_form.name, p.learned and p.learned.name, p.scheme.num_bits)
        for n, p in plans[2].layers.items()
    }
    assert names["mlp.up_proj"] == ("rtn", None, 8)
    assert names["self_attn.q_proj"] == ("gptq", "flexround", 3)
    assert plans[2].objective.name == "logit_ce"  # the rule that trains decides, though another matched first
    assert plans[2].steps == 5
    assert plans[0].layers["model.layers.0.self_attn.q_proj"].scheme.num_bits == 4
    assert set(plans[1].layers) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        *(f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")),
    }
    assert not plans[1].layers["model.layers.1.self_attn.q_proj"].scheme.symmetric
    assert not plans[1].learned


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "no rule"),
        ([Rule("all", "gpqt")], "did you mean 'gptq'"),
        ([Rule("all", {"bits": 3})], "has no name"),
        ([Rule("all", "gptq", objective="logit_cee")], "did you mean 'logit_ce'"),
        ([Rule("all", {"name": "gptq", "bits": 1})], "outside 2 … 8"),
        ([Rule("all", {"name": "gptq", "bits": "3"})], "must be of type int"),
        ([Rule("all", {"name": "gptq", "symetric": True})], "did you mean 'symmetric'"),
        ([Rule("all", {"name": "gptq", "damp": "much"})], "damp"),
        ([Rule("all", {"name": "gptq", "group_size": 0})], "group_size"),
        ([Rule("all", {"name": "gptq", "group_size": 32})], "48 inputs of model.layers.0.mlp.down_proj; .* 16, -1 "),
        ([Rule("all", {**FLEXROUND, "init": "flexround"})], "init 'flexround' does not solve"),
        ([Rule("all", {**FLEXROUND, "init": {"name": "block_ap", "init": "flexround"}})], "init 'block_ap' does not"),
        ([Rule("all", {"name": "fp", "bits": 3})], "omit bits, group_size, symmetric and grid"),
        ([Rule("all", {**FLEXROUND, "init": "fp"})], "init 'fp' does not solve"),
        ([Rule("*.q_proj", "gptq"), Rule("all", "awq")], r"q_proj.*read one tensor, so awq scales all of them or none"),
        ([Rule("*.up_proj", {"name": "awq", "bits": 3}), Rule("all", "awq")], r"gate_proj.*for one grid"),
        ([Rule("all", {**FLEXROUND, "init": {"name": "gptq", "damp": 0.0}})], "damp 0.0 must be above 0"),
        ([Rule("all", {"name": "nf4", "bits": 3})], "nf4 has 4 bits"),
        ([Rule("all", {"name": "nf4", "group_size": 32})], "nf4: group_size 32 must be one of 64"),
        ([Rule("all", FLEXROUND, objective="logit_ce")], "block 0 is not the last; use `match: last`"),
        ([Rule("all", FLEXROUND, final_blocks=2)], "goes with `match: last`"),
        ([Rule("last", FLEXROUND, final_blocks=4)], "final_blocks 4 is more than the model's 3 blocks"),
        ([Rule("all", FLEXROUND, optimizer="adamm")], "did you mean 'adam'"),
        ([Rule("all", {**FLEXROUND, "rank": -1})], "rank"),
        ([Rule("last", FLEXROUND, objective=[])], "the list is empty"),
        ([Rule("last", FLEXROUND, objective=[{"name": "kl"}])], "positive weight"),
        ([Rule("last", FLEXROUND, objective=[{"name": "kll", "weight": 1}])], "did you mean 'kl'"),
        ([Rule("all", {**FLEXROUND, "init": "gtpq"})], "did you mean 'gptq'"),
        ([Rule("all", "gptq", steps=0)], "steps"),
        ([Rule("all", "gptq", objective={"name": "js", "beta": 2.0})], r"plan\[0\]: objective js: beta"),
        ([Rule("all", "gptq", lr=-1.0)], "lr"),
        ([Rule("all", "gptq"), Rule(3, "gptq")], r"plan\[1\]: match 3 matches nothing"),
        ([Rule("*.qq_proj", "gptq")], "matches nothing"),
        ([Rule("all", "gptq"), Rule("last", FLEXROUND)], r"plan\[1\]: match 'last' is never used"),
        ([Rule("all", {**FLEXROUND, "init": 3})], "neither a name nor"),
        ([Rule("*.mlp.*", FLEXROUND), Rule("all", FLEXROUND, lr=1e-3)], "both train block 0"),
    ],
)
def test_mistakes(skeleton, rules, message):
    with pytest.raises(UserError, match=message):
        Plan(rules).resolve(skeleton)


def test_a_family_without_folds(llama):
    skeleton = ModelSkeleton(open_checkpoint(str(llama)))
    skeleton.checkpoint.family = Family(folds=())
    with pytest.raises(UserError, match="no such pairs are known of llama; add `folds`"):
        Plan([Rule("all", "awq")]).resolve(skeleton)
    assert len(Plan([Rule("all", "gptq")]).resolve(skeleton)) == 3


def test_hard_labels_and_soft_capped_logits(tmp_path):
    skeleton = ModelSkeleton(open_checkpoint(str(save_tiny(tmp_path, "gemma2"))))
    both = [{"name": "hard_ce", "weight": 1}, {"name": "mse", "weight": 1}]
    for objective in ("hard_ce", both):
        with pytest.raises(UserError, match=r"plan\[0\]: objective hard_ce.* soft-capped logits; use logit_ce"):
            Plan([Rule("last", FLEXROUND, objective=objective)]).resolve(skeleton)


@pytest.mark.parametrize("rule", [Rule("all", "nf4"), Rule("all", FLEXROUND, optimizer="adamw8bit")], ids=str)
def test_a_missing_package_is_named_at_once(rule, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs bitsandbytes; pip install bitsandbytes"):
        Plan([rule])
