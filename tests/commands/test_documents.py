"""The documents: their examples run, their links lead somewhere, and their commands and options exist."""

import json
import re
import shlex

import pytest
import torch

from docs import configuration
from lfq_lightning.cli import commands, main
from lfq_lightning.file_names import CONFIG
from lfq_lightning.packed.load_model import load
from lfq_lightning.registry import load_plugin_file
from lfq_lightning.run import read_config
from tests.helpers import GPTQ, ROOT, run

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CURRENT = [file for file in DOCUMENTS if file.name not in {"log.md", "results.md"}]  # those record what was, as it was


def test_the_documented_stage(config):
    """docs/my_stage.py: it ships what was there, byte for byte."""
    plain = config(plan=[{"match": "all", "quantizer": GPTQ}])
    run(plain)
    shards = {file.name: file.read_bytes() for file in (plain.parent / "run").glob("*.safetensors")}
    rules = [{"match": "all", "quantizer": GPTQ}, {"match": "my_stage", "quantizer": "rtn"}]
    staged = config(plan=rules, plugins=[str(ROOT / "docs" / "my_stage.py")], output=str(plain.parent / "staged"))
    run(staged)
    assert {file.name: file.read_bytes() for file in (plain.parent / "staged").glob("*.safetensors")} == shards
    journal = [json.loads(line) for line in (plain.parent / "staged" / "journal.jsonl").read_text().splitlines()]
    assert journal[-1]["name"] == "the whole model, once more" and len(journal) == 4


def test_the_documented_callback(config, tmp_path):
    written = tmp_path / "kl.txt"
    callback = {"name": "my_callback", "file": str(written)}
    run(config(plugins=[str(ROOT / "docs" / "my_callback.py")], callbacks=[callback]))
    assert len(written.read_text().splitlines()) == 3


def test_the_documented_format(config, tmp_path):
    path = config(plan=[{"match": "all", "quantizer": GPTQ}])
    run(path)
    file, output = ROOT / "docs" / "my_format.py", tmp_path / "plain"
    main(["export", str(path.parent / "run"), "--plugins", str(file), "--format", "my_format", "--output", str(output)])
    load_plugin_file(file)
    assert json.loads((output / CONFIG).read_text())["quantization_config"]["quant_method"] == "plain-codes"
    ours, theirs = (
        dict(load(folder, dequantize=True)[0].named_parameters()) for folder in (path.parent / "run", output)
    )
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{document.name}: {target}"


def test_the_configuration_reference_is_that_of_the_code():
    assert configuration.PAGE.read_text(encoding="utf-8") == configuration.page(), "run python docs/configuration.py"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1000


def _commands() -> list[tuple[str, list[str]]]:
    found = []
    for document in CURRENT:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["lfq"] or words[:2] == ["lightning", "run"]:
                    found.append((document.name, ["lfq", *words[1:]]))
    return found


@pytest.mark.parametrize(("document", "words"), _commands(), ids=str)
def test_commands_and_options_exist(document, words, capsys):
    name, options = words[1], [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
    if name in {"--version", "--help"}:
        return
    assert name in commands(), document
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code in (0, None)
    known = set(re.findall(r"--[\w-]+(?:\.[\w.]+)*", capsys.readouterr().out))
    for option in options:
        spelled = {option, option.replace("-", "_").replace("__", "--", 1)}
        assert spelled & known or (name in {"run", "plan", "data"} and "." in option), (document, option)
    configs = [ROOT / words[place + 1] for place, word in enumerate(words) if word == "--config"]
    for file in configs:
        if file.parent.name == "configs":
            read_config(["run", "--config", str(file), "--model.checkpoint", "any", "--output", "anywhere"])
