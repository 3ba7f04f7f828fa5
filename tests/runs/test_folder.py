"""A run's folder is safe: one run at a time, foreign files stay, damage is seen, a full disk costs a sentence."""

import errno
import json
import multiprocessing
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfq_lightning import write_file
from lfq_lightning.cli import main
from lfq_lightning.errors import UserError
from lfq_lightning.file_names import LOCK
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.packed.load_model import load
from lfq_lightning.packed.packed_folder import PackedFolder
from lfq_lightning.packed.seal import changed_files, sealed, sha256, unsealed
from lfq_lightning.plan import Plan, Rule
from lfq_lightning.runs.block_state import _checksum, read_facts
from lfq_lightning.runs.fingerprint import block_fingerprint
from lfq_lightning.runs.plugin_sources import sources, with_terms
from lfq_lightning.runs.run_folder import RunFolder
from lfq_lightning.write_file import write_tensors
from tests.helpers import GPTQ, fails, run

RTN = [{"match": "all", "quantizer": {"name": "rtn", "bits": 4, "group_size": 16}}]


@pytest.fixture
def finished(config, tmp_path):
    run(config(plan=RTN))
    return tmp_path / "run"


def flip(file, place=0.5):
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


# ---- one run at a time -----------------------------------------------------------------------------------------------


def _hold(path, held, done):
    folder = RunFolder(path, 4)
    folder.lock()
    held.set()
    done.wait(60)


def test_a_folder_in_use_is_refused_at_once(config, tmp_path, capsys):
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", held, done))
    other.start()
    assert held.wait(60)
    try:
        assert "is in use by another run" in fails(capsys, "run", "--config", str(config(plan=RTN)))
        assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]
    finally:
        other.kill()
        other.join()
    run(config(plan=RTN))  # the lock went with the process
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_refused_run_leaves_no_folder(config, tmp_path, capsys):
    fails(capsys, "run", "--config", str(config(plan=RTN, reuse=str(tmp_path / "nothing"))))
    assert not (tmp_path / "run").exists()


# ---- what is the user's stays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tokenizer-my-thesis.docx", "notes.txt", "my-config.json", "evaluation/thesis.txt", "model-1.safetensors"]
)
def test_overwrite_keeps_what_no_run_wrote(config, finished, capsys, name):
    (finished / name).parent.mkdir(exist_ok=True)
    (finished / name).write_text("precious")
    before = sorted(file.name for file in finished.iterdir())
    assert name in fails(capsys, "run", "--config", str(config(plan=RTN)), "--overwrite", "true")
    assert (finished / name).read_text() == "precious" and before == sorted(file.name for file in finished.iterdir())


def test_nothing_is_removed_before_the_new_run_has_passed_its_checks(config, finished, capsys, tmp_path):
    before = {file: sha256(file) for file in finished.iterdir() if file.is_file()}
    (tmp_path / "short.txt").write_text("too little")
    path = config(plan=RTN, data={"dataset": str(tmp_path / "short.txt")})
    fails(capsys, "run", "--config", str(path), "--overwrite", "true")
    assert before == {file: sha256(file) for file in finished.iterdir() if file.is_file()}


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_seal():
    content = {"a": [1, 2.5, None], "b": "ü"}
    text = json.dumps(sealed(content))
    assert unsealed(text) == content
    for damaged in (text.replace("2.5", "2.4"), text.replace("sha256", "sha255"), text[:-3], "[]", json.dumps(content)):
        with pytest.raises(ValueError, match=r"checksum differs|Unterminated|Expecting|delimiter"):
            unsealed(damaged)


def test_changed_small_files_are_told(finished):
    assert changed_files(finished) == []
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.9}))
    flip(finished / "tokenizer.json")
    assert sorted(PackedFolder(finished).changed) == ["config.json", "tokenizer.json"]
    shutil.copy(finished / "lfq.yaml", finished / "tokenizer_config.json")
    assert "tokenizer_config.json" in PackedFolder(finished).changed


def test_inspect_and_load_name_an_edited_config(finished, capsys, caplog):
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.9}))
    main(["inspect", str(finished)])
    assert "not what was written: config.json" in capsys.readouterr().out
    load(finished)
    assert "config.json is not what was written" in caplog.text


@pytest.mark.parametrize("name", ["metrics.json", "journal.jsonl", "versions.json", "lfq.yaml", "config.json"])
def test_a_report_is_not_made_of_damaged_files(finished, capsys, name):
    for content in ("{}", None):
        if content is None:
            flip(finished / name)
        else:
            before = (finished / name).read_bytes()
            (finished / name).write_text(content)
        assert name in fails(capsys, "report", str(finished))
        (finished / name).write_bytes(before)


def spoil(folder, change):
    """Change one tensor of a packed folder, its shard's checksum with it."""
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors = load_file(file)
        names = [name for name in tensors if name.endswith("weight_scale")]
        if names:
            tensors[names[0]] = change(tensors[names[0]])
            save_file(tensors, file, {"format": "pt"})
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            index["metadata"]["sha256"][file.name] = sha256(file)
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            return


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scale: torch.where(scale == scale[0, 0], torch.nan, scale), "holds NaN or infinity"),
        (lambda scale: scale.double(), "is stored as torch.float64"),
        (lambda scale: scale.int(), "is stored as torch.int32"),
        (lambda scale: scale[:, :1].clone(), "but by config.json it would be"),
    ],
    ids=["NaN", "fp64", "int32", "shape"],
)
def test_a_packed_folder_that_cannot_be_computed_with(finished, capsys, change, message):
    spoil(finished, change)
    for command in (["inspect", str(finished)], ["generate", str(finished), "x", "--max-new-tokens", "2"]):
        assert message in fails(capsys, *command)


def test_inspect_promises_only_what_load_does(finished, capsys):
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    for command in (["inspect", str(finished)], ["generate", str(finished), "x"]):
        assert "has no tensor model.layers.3" in fails(capsys, *command)


def test_an_expression_without_end_in_a_config(finished, capsys, monkeypatch):
    monkeypatch.setattr("lfq_lightning.models.limits._SECONDS", 1.0)
    config = json.loads((finished / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    for expression, message in ((r"re:(([a-z_.0-9])+)+X$", "does not end"), ("re:(", "quantization_config")):
        group["targets"] = [expression]
        (finished / "config.json").write_text(json.dumps(config))
        assert message in fails(capsys, "inspect", str(finished))


def test_reuse_verifies_shards_and_journal(config, finished, capsys, tmp_path):
    shard = finished / "model-00002-of-00004.safetensors"
    good = shard.read_bytes()
    flip(shard, 0.9)
    again = ("--output", str(tmp_path / "again"), "--reuse", str(finished))
    message = fails(capsys, "run", "--config", str(config(plan=RTN)), *again)
    assert f"{shard.name} is not what was written" in message
    shard.write_bytes(good)
    flip(finished / "journal.jsonl")
    assert "is damaged" in fails(capsys, "run", "--config", str(config(plan=RTN)), *again)


def test_a_damaged_state_is_not_resumed_from(tmp_path):
    file, tensors = tmp_path / "state.safetensors", {"now.x": torch.randn(40), "best.x": torch.randn(40)}
    facts = json.dumps({"fingerprint": "mine", "step": 3, "best_loss": 0.125})
    write_tensors(file, tensors, {"state": facts, "sha256": _checksum(tensors, facts)})
    assert read_facts(file, "mine")["step"] == 3 and read_facts(file, "another's") == {}
    whole = file.read_bytes()
    for place in (0.05, 0.3, 0.6, 0.99):
        file.write_bytes(whole)
        flip(file, place)
        assert read_facts(file, "mine") == {}
    assert read_facts(tmp_path / "none", "mine") == {}


# ---- changed sources -------------------------------------------------------------------------------------------------


def test_the_terms_of_a_sum_and_what_files_import_are_in_the_fingerprint(monkeypatch, tmp_path):
    rules = [Rule("all", dict(GPTQ), objective=[{"name": "mse", "weight": 1.0}, {"name": "logit_ce", "weight": 2.0}])]
    objective = Plan(rules)._rules[0].objective
    assert [plugin.name for plugin in with_terms(objective)] == ["mse+logit_ce", "mse", "logit_ce"]
    text = sources(OBJECTIVES.parse("logit_ce"))
    for part in ("class LogitCE", "class SoftTargetObjective", "def linear_soft_ce", "class Objective", "class Head"):
        assert part in text, part


def test_a_plugins_own_helpers_are_in_its_sources(tmp_path, monkeypatch):
    (tmp_path / "my_helper_7.py").write_text("FACTOR = 2\n")
    (tmp_path / "my_objective_7.py").write_text(
        "from my_helper_7 import FACTOR\nfrom lfq_lightning.objectives import OBJECTIVES, Objective\n\n\n"
        '@OBJECTIVES.register\nclass Mine(Objective):\n    """Twice the error."""\n\n    paper = "none"\n\n'
        "    def token_loss(self, hidden, target, head):\n"
        '        return FACTOR * (hidden - target["hidden"]).square().mean(-1)\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from lfq_lightning.registry import load_plugin_file

    load_plugin_file(tmp_path / "my_objective_7.py")
    plugin = OBJECTIVES.parse("my_objective_7")
    before = sources(plugin)
    assert "FACTOR = 2" in before and "class Objective" in before
    from lfq_lightning.runs import plugin_sources

    (tmp_path / "my_helper_7.py").write_text("FACTOR = 3\n")
    plugin_sources._sources.cache_clear()
    assert sources(plugin) != before
    OBJECTIVES._classes.pop("my_objective_7")


def test_block_fingerprint_knows_the_sources(monkeypatch, llama):
    from lfq_lightning.models.checkpoints import open_checkpoint
    from lfq_lightning.models.model_skeleton import ModelSkeleton

    plan = Plan([Rule("all", dict(GPTQ))]).resolve(ModelSkeleton(open_checkpoint(str(llama))))[0]
    before = block_fingerprint("", plan, {})
    monkeypatch.setattr("lfq_lightning.runs.fingerprint.sources", lambda plugin: "other")
    assert block_fingerprint("", plan, {}) != before


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3, 7, 12, 18])
def test_a_full_disk_costs_a_sentence_and_no_byte(config, finished, tmp_path, capsys, monkeypatch, after):
    """The disk fills at any of a run's writes; once there is room the same command gives the same bytes."""
    writes = 0
    real = write_file.to_disk

    def to_disk(path):
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path)

    path = config(plan=RTN, output=str(tmp_path / "full"))
    monkeypatch.setattr(write_file, "to_disk", to_disk)
    monkeypatch.setattr("lfq_lightning.runs.run_folder.to_disk", to_disk)
    message = fails(capsys, "run", "--config", str(path))
    assert "No space left on device" in message and "free some space" in message
    monkeypatch.setattr(write_file, "to_disk", real)
    monkeypatch.setattr("lfq_lightning.runs.run_folder.to_disk", real)
    run(path)
    for file in finished.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "full" / file.name).read_bytes()
    assert changed_files(tmp_path / "full") == []


def test_a_model_whose_report_could_not_be_written_is_finished(config, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise UserError("no room.")

    monkeypatch.setattr("lfq_lightning.callbacks.report.write_report", full)
    run(config(plan=RTN))
    assert "the report was not written: no room." in caplog.text
    load(tmp_path / "run")
