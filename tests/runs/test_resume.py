"""A run that ends early goes on where it was: the same bytes as an uninterrupted one; what does not fit is refused."""

import dataclasses
import json
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file

from lfq_lightning.calibration.calibration_module import CalibrationModule
from lfq_lightning.callbacks.block_scheduler import BlockScheduler
from lfq_lightning.data import CalibrationData
from lfq_lightning.errors import StoppedError, UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.packed.seal import sealed, unsealed
from lfq_lightning.plan import Rule
from lfq_lightning.runs.fingerprint import own_facts, sample_digest
from lfq_lightning.trainer import Trainer
from tests.helpers import (
    KINDS,
    Count,
    KillAfterBlock,
    KillAt,
    KilledError,
    same_bytes,
    save_kinds,
    save_tiny,
    thorough_but,
)

FLEXROUND = {"name": "flexround", "bits": 3, "group_size": 16, "init": "gptq", "offset": True}
RULES = [
    Rule("last", FLEXROUND, objective={"name": "logit_ce", "coverage": 0.9}, steps=7, batch_size=4),
    Rule(1, {"name": "adaround", "bits": 3, "group_size": 16, "init": "awq"}, steps=7, batch_size=4),
    Rule("all", {"name": "gptq", "bits": 3, "group_size": 16}),
]
OTHER = Rule(1, FLEXROUND, steps=7, batch_size=4)
LONGER = Rule("last", FLEXROUND, objective="logit_ce", steps=9, batch_size=4)
SETTINGS = [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, {"val_check_interval": 0.3}]


def calibrate(
    model, text, output, *callbacks, rules=RULES, overwrite=False, reuse=None, save_seconds=0.0, data=None, **trainer
):
    scheduler = BlockScheduler(rules, str(output), overwrite, reuse, save_seconds, resolved_config="a: 1")
    settings = {"num_samples": 12, "seq_len": 32, "num_held_out": 5, "seed": 3, **(data or {})}
    options = {"accelerator": "cpu", "precision": "32-true", "logger": False, **trainer}
    Trainer(callbacks=[scheduler, *callbacks], **options).run(
        CalibrationModule(str(model)), CalibrationData(str(text), **settings)
    )
    return scheduler


@pytest.fixture(scope="module")
def whole(llama, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    calibrate(llama, text_file, folder)
    return folder


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 10, 14, 15])
def test_killed_anywhere_the_bytes_are_the_same(whole, llama, text_file, tmp_path, batch):
    with pytest.raises(KilledError):
        calibrate(llama, text_file, tmp_path / "run", KillAt(batch))
    assert not (tmp_path / "run" / "config.json").exists()
    count = Count()
    calibrate(llama, text_file, tmp_path / "run", count)
    same_bytes(whole, tmp_path / "run")
    # block 0 is one batch, of blocks 1 and 2 each step is saved when the next one begins
    done = {1: 0, 2: 1, 4: 3, 8: 7, 10: 9, 14: 13, 15: 14}[batch]
    assert count.batches == 15 - done
    assert count.blocks == [0, 1, 2][0 if batch == 1 else 1 if batch <= 8 else 2 :]


@pytest.mark.parametrize("kind", thorough_but("mixture", KINDS))
def test_other_kinds_of_model_resume_and_are_reused(kinds, text_file, tmp_path, kind):
    model = kinds[kind]
    calibrate(model, text_file, tmp_path / "whole")
    with pytest.raises(KilledError):
        calibrate(model, text_file, tmp_path / "run", KillAt(10))
    calibrate(model, text_file, tmp_path / "run")
    same_bytes(tmp_path / "whole", tmp_path / "run")
    rules = [LONGER, *RULES[1:]]
    calibrate(model, text_file, tmp_path / "new", rules=rules)
    count = Count()
    calibrate(model, text_file, tmp_path / "again", count, rules=rules, reuse=str(tmp_path / "whole"))
    assert count.blocks == [2]
    same_bytes(tmp_path / "new", tmp_path / "again")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return save_kinds(tmp_path_factory.mktemp("kinds"))


def test_killed_between_the_last_block_and_the_end(whole, llama, text_file, tmp_path):
    for _ in range(2):
        with pytest.raises(KilledError):
            calibrate(llama, text_file, tmp_path / "run", KillAfterBlock())
    assert not (tmp_path / "run" / "config.json").exists()
    calibrate(llama, text_file, tmp_path / "run")
    same_bytes(whole, tmp_path / "run")


def test_killed_again_and_again(whole, llama, text_file, tmp_path):
    for _ in range(20):
        try:
            calibrate(llama, text_file, tmp_path / "run", KillAt(2))
        except KilledError:
            continue
        break
    same_bytes(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "trainer", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, {"val_check_interval": 0.3}]
)
def test_under_lightnings_settings(llama, text_file, tmp_path, trainer):
    calibrate(llama, text_file, tmp_path / "whole", **trainer)
    with pytest.raises(KilledError):
        calibrate(llama, text_file, tmp_path / "run", KillAt(6 * trainer.get("accumulate_grad_batches", 1)), **trainer)
    calibrate(llama, text_file, tmp_path / "run", **trainer)
    same_bytes(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("training", [{"optimizer": "adamw8bit"}, {"activation_checkpointing": True}], ids=str)
def test_under_memory_savers(text_file, tmp_path, training):
    model = save_tiny(tmp_path / "model", hidden_size=128, intermediate_size=256, head_dim=32)  # 8 bits begin at 4096
    rules = [dataclasses.replace(rule, **training) for rule in RULES]
    calibrate(model, text_file, tmp_path / "whole", rules=rules)
    with pytest.raises(KilledError):
        calibrate(model, text_file, tmp_path / "run", KillAt(6), rules=rules)
    calibrate(model, text_file, tmp_path / "run", rules=rules)
    same_bytes(tmp_path / "whole", tmp_path / "run")
    calibrate(model, text_file, tmp_path / "plain")
    shards = [(tmp_path / run / "model-00004-of-00004.safetensors").read_bytes() for run in ("plain", "whole")]
    assert (shards[0] == shards[1]) == ("activation_checkpointing" in training)


def test_activations_in_files(whole, llama, text_file, tmp_path, caplog):
    with caplog.at_level("INFO"):
        calibrate(llama, text_file, tmp_path / "run", data={"host_gb": 0})
    assert "train.student, 0.00 GB, in a file below" in caplog.text
    same_bytes(whole, tmp_path / "run")
    calibrate(llama, text_file, tmp_path / "part", data={"host_gb": 30e-6})  # some fit
    same_bytes(whole, tmp_path / "part")
    with pytest.raises(UserError, match=r"data.host_gb: -1 is negative"):
        calibrate(llama, text_file, tmp_path / "bad", data={"host_gb": -1})


def test_between_saves_an_interval_is_lost(whole, llama, text_file, tmp_path):
    with pytest.raises(KilledError):
        calibrate(llama, text_file, tmp_path / "run", KillAt(5), save_seconds=1e9)
    count = Count()
    calibrate(llama, text_file, tmp_path / "run", count)
    assert count.batches == 14  # block 1 from its start
    same_bytes(whole, tmp_path / "run")


def test_sigterm_saves_and_says_how_to_go_on(whole, llama, text_file, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=r"SIGTERM at block 1, step 4; run the same command again") as caught:
        calibrate(llama, text_file, tmp_path / "run", KillAt(5, by="sigterm"), save_seconds=1e9)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    count = Count()
    calibrate(llama, text_file, tmp_path / "run", count, save_seconds=1e9)
    assert count.batches == 10
    same_bytes(whole, tmp_path / "run")


@pytest.mark.parametrize("damage", ["deleted", "corrupted", "torn journal", "partial left", "state corrupted"])
def test_damage_between_runs(whole, llama, text_file, tmp_path, damage, caplog):
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        calibrate(llama, text_file, run, KillAt(11))
    shard = run / "model-00002-of-00004.safetensors"
    if damage == "deleted":
        shard.unlink()
    elif damage == "corrupted":
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
    elif damage == "torn journal":
        journal = run / "journal.jsonl"
        journal.write_text(journal.read_text()[:-20])
    elif damage == "state corrupted":
        state = run / "state.safetensors"
        state.write_bytes(state.read_bytes()[:100])
    else:
        (run / "model-00004-of-00004.safetensors.partial").write_bytes(b"half")
        (run / ".tmpcAjhZh").write_bytes(b"what safetensors leaves when it is killed")
    with caplog.at_level("WARNING"):
        calibrate(llama, text_file, run)
    same_bytes(whole, run)
    said = {"deleted": "is missing", "corrupted": "is not what was written", "torn journal": "is torn"}
    assert said.get(damage, "") in caplog.text


@pytest.fixture
def left(llama, text_file, tmp_path):
    with pytest.raises(KilledError):
        calibrate(llama, text_file, tmp_path / "run", KillAt(11))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rules": [RULES[0], Rule(1, FLEXROUND, steps=7, batch_size=4), RULES[2]]},
            "quantizer of model.layers.1.self_a",
        ),
        (
            {"rules": [Rule("last", FLEXROUND, objective="logit_ce", steps=9, batch_size=4), *RULES[1:]]},
            r"steps of block 2 \(7, now 9\)",
        ),
        ({"data": {"num_samples": 8}}, r"data.num_samples \(12, now 8\)"),
        ({"data": {"seed": 4}}, r"seed \(3, now 4\)|another data"),
        ({"precision": "bf16-mixed"}, r"trainer.precision \('32-true', now 'bf16-mixed'\)"),
    ],
)
def test_a_changed_run_is_refused_and_nothing_is_lost(left, llama, text_file, changes, message):
    before = {file.name: file.read_bytes() for file in left.iterdir()}
    with pytest.raises(UserError, match=f"was made with another .*{message}.*--overwrite"):
        calibrate(llama, text_file, left, **changes)
    assert {file.name: file.read_bytes() for file in left.iterdir()} == before


def test_changed_bytes_are_refused(left, llama, text_file, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copyfile(text_file, text)
    with pytest.raises(UserError, match=r"another data.dataset"):
        calibrate(llama, text, left)
    facts = unsealed((left / "facts.json").read_text())
    facts["own"]["data.dataset"] = str(text)  # as if it had begun with that file
    (left / "facts.json").write_text(json.dumps(sealed(facts)))
    text.write_bytes(text_file.read_bytes().replace(b"beer", b"wine"))
    with pytest.raises(UserError, match=r"another data \("):
        calibrate(llama, text, left)


def test_a_run_of_another_version_is_refused(left, llama, text_file):
    facts = unsealed((left / "facts.json").read_text())
    facts["shared"]["version of lfq-lightning"] = "0.1.0"
    (left / "facts.json").write_text(json.dumps(sealed(facts)))
    with pytest.raises(UserError, match=r"was begun by lfq_lightning 0\.1\.0, and this is .*; finish it with"):
        calibrate(llama, text_file, left)


def test_changed_weights_are_refused(left, llama, text_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"another model file model.safetensors"):
        calibrate(model, text_file, left)
    facts = unsealed((left / "facts.json").read_text())
    facts["own"]["model file model.safetensors"] = sample_digest(model / "model.safetensors")
    (left / "facts.json").write_text(json.dumps(sealed(facts)))  # as if no sample had met that weight
    with pytest.raises(UserError, match=r"other weights in block 0"):
        calibrate(model, text_file, left)


def test_overwrite_starts_anew(whole, left, llama, text_file):
    count = Count()
    calibrate(llama, text_file, left, count, overwrite=True)
    assert count.batches == 15
    same_bytes(whole, left)


def test_generated_data_is_kept(chat_llama, tmp_path):
    data = {"num_samples": 4, "num_held_out": 2}
    rules = [Rule("all", {"name": "flexround", "group_size": 16}, steps=3, batch_size=2)]
    calibrate(chat_llama, "self_generated", tmp_path / "whole", rules=rules, data=data)
    with pytest.raises(KilledError):
        calibrate(chat_llama, "self_generated", tmp_path / "run", KillAt(5), rules=rules, data=data)
    assert (tmp_path / "run" / "tokens.safetensors").is_file()
    calibrate(chat_llama, "self_generated", tmp_path / "run", rules=rules, data=data)
    same_bytes(tmp_path / "whole", tmp_path / "run")


def test_edited_prompts_are_refused(chat_llama, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one?\ntwo?\nthree?\n")
    checkpoint = open_checkpoint(str(chat_llama))
    dataset = [{"source": "self_generated", "prompts": str(prompts)}]
    data = CalibrationData(dataset, num_samples=2, seq_len=32, num_held_out=1)
    before = own_facts([], data, checkpoint)
    prompts.write_text("one?\ntwo?\nfour?\n")
    after = own_facts([], data, checkpoint)
    assert {name for name in after if after[name] != before[name]} == {f"data file {prompts}"}
