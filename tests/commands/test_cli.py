"""The command line: what works, and that each mistake costs one sentence."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lfq_lightning.cli import lightning_main, main
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.quantizers import QUANTIZERS
from tests.helpers import FLEXROUND, GPTQ, ROOT, fails, run, save_tiny


def test_run_and_generate(config, chat_llama, capsys):
    path = config(model={"checkpoint": str(chat_llama)}, data={"dataset": "self_generated"})
    run(path)
    printed = capsys.readouterr().out
    assert "block 3/3  flexround  logit_ce" in printed
    assert "top-1 agreement" in printed
    output = path.parent / "run"
    resolved = yaml.safe_load((output / "lfq.yaml").read_text())
    assert resolved["plan"][0]["final_blocks"] == 1
    assert resolved["data"]["dataset"] == "self_generated"
    main(["generate", str(output), "hello there", "--max-new-tokens", "12"])
    ours = capsys.readouterr().out.rstrip("\n")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    chat = [{"role": "user", "content": "hello there"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert ours == tokenizer.decode(theirs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_resolved_config_runs_again(config, tmp_path):
    run(config())
    again = tmp_path / "again"
    run(tmp_path / "run" / "lfq.yaml", "--output", str(again))
    for file in (tmp_path / "run").glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_configs_merge_and_print(config, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text("data: {num_samples: 99}\ntrainer: {precision: bf16-mixed}\n")
    with pytest.raises(SystemExit) as stopped:
        run(config(), "--config", str(other), "--data.seq_len", "16", "--print_config")
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["num_samples"] == 99
    assert printed["data"]["seq_len"] == 16
    assert printed["trainer"]["precision"] == "bf16-mixed"
    assert printed["plan"][1]["objective"] == "mse"


PRESETS = sorted(file for file in (ROOT / "configs").glob("*.yaml") if not file.is_symlink())


def test_the_presets_that_are_asked_for_are_there():
    asked = "flexround-lfq-w4 flexround-lfq-w3g128 flexround-lfq-w2g64 gptq-lfq-w4g128 awq-w4g128 omniquant-lfq-w4"
    asked += " block-ap-lfq-w3g128"
    for widths in ("w4", "w3g128", "w2g64"):
        asked += f" fast-{widths} balanced-{widths} best-{widths}"
        older, now = (ROOT / "configs" / f"{name}-{widths}.yaml" for name in ("recommended", "balanced"))
        assert older.read_text() == now.read_text()
    assert set(asked.split()) <= {preset.stem for preset in PRESETS}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_every_preset_runs(preset, monkeypatch, tmp_path, text_file):
    """Whole, on a model wide enough for groups of 128; only steps, data and paths are cut down."""
    monkeypatch.chdir(ROOT)
    model = save_tiny(tmp_path / "model", hidden_size=128, intermediate_size=256, head_dim=32, dtype=torch.bfloat16)
    content = yaml.safe_load(preset.read_text())
    for rule in content["plan"]:
        if "steps" in rule:
            rule["steps"] = 4
    content["data"] |= {"dataset": str(text_file), "num_samples": 8, "seq_len": 32, "num_held_out": 4}
    content |= {"model": {"checkpoint": str(model)}, "output": str(tmp_path / "run")}
    cut = tmp_path / "cut.yaml"
    cut.write_text(yaml.safe_dump(content))
    run(cut)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    last = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[-1])
    assert last["loss_after"] <= last["loss_before"] * 1.0001
    # the steps are chosen by the loss, which may have other terms than the KL
    assert 0 < metrics["held_out"]["kl"] <= metrics["before_last_training"]["held_out"]["kl"] * 1.05
    printed = yaml.safe_load((tmp_path / "run" / "lfq.yaml").read_text())
    assert len(printed["plan"]) == len(content["plan"])


def test_the_documented_objective(config, capsys):
    """docs/extend-objective.md shows docs/my_objective.py as it is, and a block trains with it."""
    file = ROOT / "docs" / "my_objective.py"
    assert file.read_text() in (ROOT / "docs" / "extend-objective.md").read_text()
    assert len(file.read_text().splitlines()) <= 20
    rule = {"match": "last", "quantizer": FLEXROUND, "objective": {"name": "my_objective", "power": 2}, "steps": 8}
    path = config(plugins=[str(file)], plan=[rule, {"match": "all", "quantizer": GPTQ}])
    run(path)
    assert "my_objective" in capsys.readouterr().out
    last = json.loads((path.parent / "run" / "journal.jsonl").read_text().splitlines()[-1])
    assert last["objective"] == "my_objective"
    assert last["loss_after"] < last["loss_before"]


def test_the_documented_quantizer(config):
    """docs/extend-quantizer.md shows docs/my_quantizer.py as it is, and a model is quantised with it."""
    file = ROOT / "docs" / "my_quantizer.py"
    assert file.read_text() in (ROOT / "docs" / "extend-quantizer.md").read_text()
    quantizer = {"name": "my_quantizer", "bits": 3, "group_size": 16, "init": "gptq", "largest": 1.5}
    path = config(plugins=[str(file)], plan=[{"match": "all", "quantizer": quantizer, "steps": 8}])
    run(path)
    journal = [json.loads(line) for line in (path.parent / "run" / "journal.jsonl").read_text().splitlines()]
    assert all(line["quantizers"] == ["my_quantizer"] for line in journal)
    assert any(line["loss_after"] < line["loss_before"] for line in journal)


def test_list(capsys):
    main(["list"])
    printed = capsys.readouterr().out
    for name in (*QUANTIZERS.names(), *OBJECTIVES.names()):
        assert name in printed
    for word in ("flexround", "gptq", "rtn", "logit_ce", "kl", "mse", "block_scheduler", "damp=0.01", "2605.29756"):
        assert word in printed


def test_lightning_command(monkeypatch, config, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning", "run", "--config", str(config()), "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        lightning_main()
    assert stopped.value.code == 0
    assert "checkpoint:" in capsys.readouterr().out


def test_lightning_hands_other_words_on(tmp_path):
    """With lightning-sdk installed, every word but `run` is its own; without it we say what we offer."""
    code = (
        "import sys; sys.argv = ['lightning', 'login']; from lfq_lightning.cli import lightning_main; lightning_main()"
    )
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert alone.returncode == 2
    assert "install lightning-sdk" in alone.stdout
    entry = tmp_path / "lightning_sdk" / "cli" / "entrypoint.py"
    entry.parent.mkdir(parents=True)
    entry.write_text("import sys\ndef main_cli(): print('sdk', sys.argv[1:])")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout == "sdk ['login']\n"


def test_version_and_help_are_light():
    """No heavy import before an answer that needs none."""
    code = "import sys; from lfq_lightning.cli import main; main(['--help']); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "lfq run" in printed
    assert printed.endswith("False\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.checkpoint", "not/there"], "neither a folder here nor a model"),
        (["--model.checkpoint", "gone.gguf"], "no file gone.gguf"),
        (["--data.seq_len", "65"], "at most 64"),
        (["--data.seq_len", "many"], "data.seq_len"),
        (["--data.num_sample", "3"], "did you mean 'data.num_samples'"),
        (["--data.dataset", "gone.jsonl"], "no file gone.jsonl"),
        (["--data.num_samples", "4000"], "num_samples"),
        (["--trainer.devicez", "2"], "did you mean 'trainer.devices'"),
        (["--trainer.precision", "3"], "trainer"),
        (["--plan", "[{match: all, quantizer: gtpq}]"], "did you mean 'gptq'"),
        (["--plan", "[{match: all, quantizer: gptq, objectiv: mse}]"], "did you mean 'objective'"),
        (["--plan", "[{match: all, quantizer: gptq, steps: [1]}]"], "steps"),
        (["--plugins", "[gone.py]"], "no file gone.py"),
        (["--plugins", "gone.py"], "no file gone.py"),
        (["--plugins", "3"], "not a list of Python files"),
        (["--plugins", "[a.py"], "is not YAML"),
        (["--callbacks", "[consol]"], "did you mean 'console'"),
        (["--callbacks", "[console]"], "always there"),
        (["--output", __file__ + "/run"], "is a file"),
    ],
)
def test_mistakes(config, capsys, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = config()
    assert message in fails(capsys, "run", "--config", str(path), *arguments)
    assert not [file for file in (path.parent / "run").glob("*") if file.name != "logs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"num_sample": 3}}, "did you mean 'data.num_samples'"),
        ({"outptu": "x"}, "did you mean 'output'"),
        ({"plan": []}, "no rule"),
        (
            {"plan": [{"match": "all", "quantizer": {"name": "gptq", "group_size": 128}}]},
            "does not divide the 32 inputs",
        ),
        ({"model": {"checkpoint": 3}}, "model.checkpoint"),
    ],
)
def test_mistakes_in_yaml(config, capsys, changes, message):
    assert message in fails(capsys, "run", "--config", str(config(**changes)))


def test_other_mistakes(config, capsys, tmp_path):
    assert "did you mean 'run'" in fails(capsys, "rum")
    assert "File does not exist" in fails(capsys, "run", "--config", "gone.yaml")
    assert "not a finished packed model" in fails(capsys, "generate", str(tmp_path), "hi")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    assert "is not YAML" in fails(capsys, "run", "--config", str(broken))


def test_output_folders_in_the_way(config, capsys, tmp_path, monkeypatch):
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert "holds other files" in fails(capsys, "run", "--config", str(config()), "--overwrite", "true")
    assert (output / "thesis.txt").read_text() == "years of work"
    (output / "thesis.txt").unlink()
    run(config())
    before = (output / "model-00002-of-00004.safetensors").read_bytes()
    assert "holds a finished run" in fails(capsys, "run", "--config", str(config()))
    (output / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in fails(capsys, "run", "--config", str(config()), "--overwrite", "true")
    (output / "thesis.txt").unlink()
    run(config(), "--overwrite", "true")
    assert (output / "model-00002-of-00004.safetensors").read_bytes() == before
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert "its disk has 0.00 GB free" in fails(
        capsys, "run", "--config", str(config()), "--output", str(tmp_path / "b")
    )
    assert not (tmp_path / "b" / "journal.jsonl").exists()


def test_models_that_are_not_ours(config, capsys, tmp_path, llama):
    assert "model type 'bert' cannot be taken apart" in fails(
        capsys, "run", "--config", str(config(model=_bert(tmp_path / "bert")))
    )
    folder = tmp_path / "empty"
    folder.mkdir()
    checkpoint = {"checkpoint": str(folder)}
    assert "no config.json" in fails(capsys, "run", "--config", str(config(model=checkpoint)))
    (folder / "config.json").write_text("{")
    assert "cannot be read" in fails(capsys, "run", "--config", str(config(model=checkpoint)))
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert "no model.safetensors" in fails(capsys, "run", "--config", str(config(model=checkpoint)))
    (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    assert "cannot be read" in fails(capsys, "run", "--config", str(config(model=checkpoint)))
    save_tiny(tmp_path / "other", num_hidden_layers=2)
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llama / name).read_bytes())
    assert "has no tensor model.layers.2" in fails(capsys, "run", "--config", str(config(model=checkpoint)))


def test_damaged_results(config, capsys, tmp_path):
    run(config())
    output = tmp_path / "run"
    for name, keep in (
        ("config.json", 50),
        ("model.safetensors.index.json", 50),
        ("model-00002-of-00004.safetensors", 500),
    ):
        whole = (output / name).read_bytes()
        (output / name).write_bytes(whole[:keep])
        assert "copy the model again" in fails(capsys, "generate", str(output), "hi")
        (output / name).write_bytes(whole)


def test_broken_plugin(config, capsys, tmp_path):
    (tmp_path / "half_a_plugin.py").write_text("def f(:")
    message = fails(capsys, "run", "--config", str(config(plugins=["half_a_plugin.py"])))
    assert "half_a_plugin.py cannot be imported" in message


def _bert(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return {"checkpoint": str(folder)}


def test_links_at_the_top():
    for name in ("objectives", "quantizers", "callbacks", "configs"):
        assert (ROOT / name).is_symlink()
        assert (ROOT / name).resolve() == ROOT / "lfq_lightning" / name
