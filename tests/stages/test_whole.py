"""`match: whole`: after the blocks all of them are trained once more, from what they would ship as."""

import json

import pytest
import torch

from lfq_lightning.calibration.calibration_module import CalibrationModule
from lfq_lightning.data import CalibrationData
from lfq_lightning.errors import UserError
from lfq_lightning.models.load_full_precision import load_full_precision
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.packed.load_model import load
from lfq_lightning.plan import Plan, Rule
from tests.helpers import Count, KillAfterBlock, KillAt, KilledError, same_bytes, save_tiny, shards
from tests.runs import test_resume

GRID = {"bits": 2, "group_size": 16, "symmetric": False}
BLOCKS = [
    Rule("last", {"name": "flexround", **GRID}, objective="logit_ce", steps=6, batch_size=4, final_blocks=2),
    Rule("all", {"name": "gptq", **GRID}),
]
WHOLE = Rule("whole", "scales", objective="logit_ce", steps=10, batch_size=4, lr=1e-2)


def calibrate(model, text, output, *callbacks, rules=(*BLOCKS, WHOLE), **options):
    test_resume.calibrate(model, text, output, *callbacks, rules=list(rules), **options)
    return output


def read(folder):
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return json.loads((folder / "metrics.json").read_text()), lines


@pytest.fixture(scope="module")
def runs(llama, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    plain = calibrate(llama, text_file, folder / "plain", rules=BLOCKS)
    return plain, calibrate(llama, text_file, folder / "polished")


def test_it_goes_on_from_what_the_blocks_ship_and_only_scales_move(runs):
    (plain, _), (polished, lines) = map(read, runs)
    assert polished["before_last_training"] == plain["quantized"]
    assert polished["quantized"]["held_out"]["kl"] < plain["quantized"]["held_out"]["kl"]
    assert polished["model_bytes"] == plain["model_bytes"]
    assert [(line["index"], line["name"]) for line in lines][-1] == (len(lines) - 1, "the whole model")
    before, after = map(shards, runs)
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("weight_scale")}


def test_what_ships_has_the_loss_that_was_reported(runs, llama, text_file):
    """The loss of the journal is that of the model as it loads, in fp64 through transformers."""
    _, lines = read(runs[1])
    data = CalibrationData(str(text_file), num_samples=12, seq_len=32, num_held_out=5, seed=3)
    module = CalibrationModule(str(llama))
    tokens = data.token_sets(module.checkpoint, torch.device("cpu"))[1]
    student = load(runs[1], dequantize=True)[0].double()
    teacher = load_full_precision(module.checkpoint, torch.device("cpu")).double()
    with torch.no_grad():
        log_q, log_p = (model(input_ids=tokens.input_ids).logits.log_softmax(-1) for model in (student, teacher))
    entropy = -(log_p.exp() * log_q).sum(-1)[tokens.mask].mean()
    assert lines[-1]["loss_after"] == pytest.approx(float(entropy), rel=1e-5)
    assert lines[-1]["kl_after"] == pytest.approx(
        float((log_p.exp() * (log_p - log_q)).sum(-1)[tokens.mask].mean()), rel=1e-3
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_without_it_can_be_reused(llama, text_file, tmp_path, precision):
    calibrate(llama, text_file, tmp_path / "plain", rules=BLOCKS, precision=precision)
    calibrate(llama, text_file, tmp_path / "straight", precision=precision)
    calibrate(llama, text_file, tmp_path / "after", reuse=str(tmp_path / "plain"), precision=precision)
    same_bytes(tmp_path / "straight", tmp_path / "after")


def test_a_run_with_it_cannot(llama, text_file, tmp_path, runs):
    with pytest.raises(UserError, match="reuse a run without `match: whole`"):
        calibrate(llama, text_file, tmp_path / "run", rules=BLOCKS, reuse=str(runs[1]))


@pytest.mark.parametrize("where", [8, 12, 16, "end"])
def test_killed_anywhere_the_bytes_are_the_same(runs, llama, text_file, tmp_path, where):
    """1 batch for each block in closed form, 6 for the last two, then 10."""
    for _ in range(2 if where == "end" else 1):
        with pytest.raises(KilledError):
            calibrate(llama, text_file, tmp_path / "run", KillAfterBlock() if where == "end" else KillAt(where))
    calibrate(llama, text_file, tmp_path / "run")
    same_bytes(runs[1], tmp_path / "run")


def test_killed_when_all_is_written_no_block_is_calibrated_again(llama, text_file, tmp_path):
    with pytest.raises(KilledError):
        calibrate(llama, text_file, tmp_path / "run", KillAfterBlock())
    calibrate(llama, text_file, tmp_path / "run", seen := Count())
    assert len(seen.blocks) == 1


def test_any_learned_quantizer_and_any_grid(llama, text_file, tmp_path):
    """Blocks of different grids, one layer dense, one without a rule; the codes may move too."""
    rules = [
        Rule(["*.v_proj"], "nf4"),
        Rule(["*.down_proj"], {"name": "rtn", "bits": 8}),
        Rule(["*.gate_proj", "*.up_proj"], {"name": "awq", **GRID}),
        Rule("whole", "flexround", objective="logit_ce", steps=20, batch_size=4),
    ]
    metrics, _ = read(calibrate(llama, text_file, tmp_path / "run", rules=rules))
    assert metrics["quantized"]["held_out"]["kl"] < metrics["before_last_training"]["held_out"]["kl"]


@pytest.mark.parametrize(
    ("family", "quantizer"),
    [
        ("llama", {"name": "awq", **GRID}),
        ("mixtral", {"name": "rtn", "bits": 3, "group_size": 16}),
        ("gemma3_text", {"name": "gptq", "bits": 8, "group_size": 16, "symmetric": False}),
    ],
)
def test_any_model_and_setting(text_file, tmp_path, family, quantizer):
    """Folded norms, experts, negative scales and bf16 codes of 8 bits are what the training starts from."""
    model = save_tiny(tmp_path / "model", family, dtype=torch.bfloat16)
    blocks = [Rule("all", quantizer)]
    whole = Rule("whole", "scales", objective="kl", steps=8, batch_size=4, activation_checkpointing=True)
    settings = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}
    before = calibrate(model, text_file, tmp_path / "before", rules=blocks, **settings)
    after = calibrate(model, text_file, tmp_path / "after", rules=[*blocks, whole], **settings)
    (plain, _), (metrics, lines) = read(before), read(after)
    kls = [each["held_out"]["kl"] for each in (metrics["before_last_training"], plain["quantized"])]
    assert kls[0] == pytest.approx(kls[1], rel=1e-2)  # other batches: in bf16 a router may choose anew
    assert lines[-1]["best_step"] > 0 and lines[-1]["loss_after"] < lines[-1]["loss_before"]
    old, new = shards(before), shards(after)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(name.endswith("weight_scale") for name in changed)


def test_a_quantised_head_stays_as_it_shipped(text_file, tmp_path):
    model = save_tiny(tmp_path / "model", tie_word_embeddings=False)
    rules = [Rule("head", {"name": "rtn", "bits": 8, "group_size": 16}), *BLOCKS]
    before = calibrate(model, text_file, tmp_path / "before", rules=rules)
    after = calibrate(model, text_file, tmp_path / "after", rules=[*rules, WHOLE])
    old, new = shards(before), shards(after)
    head = [name for name in old if name.startswith("lm_head.weight_")]
    assert len(head) > 1 and all(torch.equal(old[name], new[name]) for name in head)
    assert read(after)[0]["before_last_training"] == read(before)[0]["quantized"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([*BLOCKS, WHOLE, WHOLE], r"plan\[3\]: match whole comes after match whole"),
        ([*BLOCKS, Rule("whole", "gptq")], r"plan\[2\]: match whole trains what codes and grids tell .* use `scales`"),
        ([*BLOCKS, Rule("whole", "adaround")], "not where it lay between two levels"),
        ([*BLOCKS, Rule("whole", {"name": "scales", "bits": 3})], r"plan\[2\]: match whole starts from .* leave bits"),
        ([*BLOCKS, Rule("whole", {"name": "scales", "init": "rtn"})], "leave bits, group_size, symmetric and init"),
        ([WHOLE], r"plan\[0\]: match whole trains what other rules have quantised, and none does"),
        ([Rule("all", "nf4"), WHOLE], "and none does"),
        ([*BLOCKS, Rule("whole", "scales", final_blocks=2)], "it goes with `match: last` only"),
    ],
)
def test_bad_rules_are_one_sentence(llama, rules, message):
    with pytest.raises(UserError, match=message):
        Plan(rules).resolve(ModelSkeleton(CalibrationModule(str(llama)).checkpoint))
