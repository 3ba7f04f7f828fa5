"""What can be checked is checked before the first block: values, keys, small files, chat templates, tokens."""

import json
import time

import pytest
import yaml
from transformers import AutoTokenizer, GenerationConfig

from lfq_lightning.errors import UserError
from lfq_lightning.models import limits
from lfq_lightning.models.chat_template import check_templates, render
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.checkpoints.small_files import check_small_files, write_small_files
from lfq_lightning.planning.read_yaml import read_yaml
from tests.helpers import byte_tokenizer, fails, run, save_tiny


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.num_samples", None),
        ("data.seq_len", None),
        ("data.dataset", None),
        ("data.host_gb", float("nan")),
        ("data.device_gb", float("inf")),
        ("seed_everything", -1),
        ("seed_everything", 2**32),
        ("save_seconds", float("nan")),
        ("plan[0].lr", float("inf")),
        ("plan[0].steps", None),
        ("plan[0].objective", None),
        ("plan[0].quantizer.damp", float("nan")),
        ("trainer.gradient_clip_val", float("nan")),
    ],
)
def test_values_that_are_none(config, capsys, key, value):
    content = json.loads(config().read_text())
    content["plan"][0]["quantizer"] = {**content["plan"][1]["quantizer"]}
    where = content
    *path, last = key.replace("[0]", ".0").split(".")
    for step in path:
        where = where[int(step)] if step.isdigit() else where[step]
    where[last] = value
    file = config()
    file.write_text(yaml.safe_dump(content))
    assert key.rpartition(".")[2] in fails(capsys, "run", "--config", str(file))


def test_a_key_that_stands_twice():
    text = "seed: 1\nplan:\n  - match: all\n    steps: 3\n    match: last\n"
    with pytest.raises(UserError, match="here: key 'match' stands twice, in lines 3 and 5"):
        read_yaml(text, "here")
    assert read_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}\n", "here") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    for broken in ("a: [", "\t- x", "{a: b: c}"):
        with pytest.raises(UserError, match="here is not YAML"):
            read_yaml(broken, "here")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_yaml_that_is_not_utf8(config, capsys, encoding):
    file = config()
    file.write_bytes(f"# café\n{file.read_text()}".encode(encoding))
    assert f"{file} is not UTF-8" in fails(capsys, "run", "--config", str(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": [{"match": "all", "quantiser": "rtn"}]}, "quantizer"),
        (
            {"plan": [{"match": "all", "quantizer": {"name": "rtn", "bit": 3}}]},
            "plan[0]: quantizer 'rtn' has no option 'bit'",
        ),
        ({"data": {"num_sample": 3}}, "num_samples"),
        ({"modle": "x"}, "model"),
    ],
    ids=str,
)
def test_an_unknown_key_and_the_nearest_one(config, capsys, change, message):
    assert message in fails(capsys, "run", "--config", str(config(**change)))


@pytest.mark.parametrize("key", ["--output", "--data.dataset", "--model.checkpoint"])
@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "~nobody-of-that-name/x"], ids=["long", "NUL", "no user"])
def test_what_can_be_no_path(config, capsys, key, path):
    message = fails(capsys, "run", "--config", str(config()), key, path)
    assert key.lstrip("-").rpartition(".")[2] in message and len(message) < 400


# ---- small files -----------------------------------------------------------------------------------------------------


def test_an_unused_temperature_is_kept(llama, tmp_path):
    model = save_tiny(tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "eos_token_id": 257}
    (model / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    write_small_files(open_checkpoint(str(model)), tmp_path / "out")
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (kept.temperature, kept.top_p, kept.eos_token_id) == (0.7, 0.9, 257)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_small_file_is_named_before_the_first_block(config, tmp_path, capsys, name, content):
    model = save_tiny(tmp_path / "model")
    (model / name).write_text(content)
    message = fails(capsys, "run", "--config", str(config(model={"checkpoint": str(model)})))
    assert "generation_config" in message if name.startswith("gen") else "tokenizer" in message
    assert "block" not in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_the_sources_tokenizer_class_and_no_local_path(config, tmp_path, llama):
    path = config()
    run(path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = tmp_path / "run" / name
        assert not file.exists() or str(llama) not in file.read_text()
    model = save_tiny(tmp_path / "model")
    for written in ("PreTrainedTokenizerFast", None):
        settings = json.loads((model / "tokenizer_config.json").read_text())
        settings.pop("tokenizer_class", None)
        if written:
            settings["tokenizer_class"] = written
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        out = tmp_path / f"out-{written}"
        out.mkdir()
        write_small_files(open_checkpoint(str(model)), out)
        assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert AutoTokenizer.from_pretrained(out)("abc") == AutoTokenizer.from_pretrained(model)("abc")


NAMED = {
    "default": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "tool_use": "T{{ messages[0]['content'] }}",
}


def test_every_named_template_is_kept(config, tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = NAMED
    tokenizer.save_pretrained(model)
    path = config(
        model={"checkpoint": str(model)}, plan=[{"match": "all", "quantizer": {"name": "rtn", "group_size": 16}}]
    )
    for more in ((), ("--overwrite", "true")):
        run(path, *more)
        assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == NAMED
    (tmp_path / "run" / "config.json").unlink()
    run(path)  # as after a kill
    from lfq_lightning.packed.export import export

    export(str(tmp_path / "run"), "gptq_v2", str(tmp_path / "gptq"))
    assert AutoTokenizer.from_pretrained(tmp_path / "gptq").chat_template == NAMED


# ---- chat templates --------------------------------------------------------------------------------------------------


def templated(template):
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = template
    return tokenizer


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWS = (
    "{% set ns = namespace(x='x' * 1000) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
)
LONG = "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"), [(LOOPS, "does not end"), (GROWS, "grows|endless"), (LONG, "grows|endless")]
)
def test_a_template_without_end_costs_a_sentence(monkeypatch, template, message):
    monkeypatch.setattr(limits, "_SECONDS", 1.0)
    started = time.process_time()
    with pytest.raises(UserError, match=message):
        check_templates(templated(template))
    assert time.process_time() - started < 8
    render(templated("{{ messages[0]['content'] }}"), [{"role": "user", "content": "fine"}])  # the limits are off again


@pytest.mark.parametrize("template", ["{{ foo.bar }}", "{% for m in %}", "{{ raise_exception('no') }}"])
def test_a_template_that_fails_says_so_where_it_is_used(template, config, tmp_path, capsys):
    with pytest.raises(UserError, match="the chat template fails"):
        render(templated(template), [{"role": "user", "content": "x"}])
    model = save_tiny(tmp_path / "model")
    templated(template).save_pretrained(model)
    check_small_files(open_checkpoint(str(model)))  # on plain text the model can be calibrated all the same
    path = config(model={"checkpoint": str(model)}, data={"dataset": "self_generated"})
    assert "chat template" in fails(capsys, "run", "--config", str(path))


def test_tokens_without_embeddings(config, tmp_path, capsys):
    model = save_tiny(tmp_path / "model", vocab_size=257)  # the byte tokenizer has 260 tokens
    byte_tokenizer(chat=True).save_pretrained(model)
    path = config(model={"checkpoint": str(model)}, data={"dataset": "self_generated"})
    message = fails(capsys, "run", "--config", str(path))
    assert ("embeddings have 257 rows" in message and "<u>" in message) or "<a>" in message


def test_nan_costs_a_sentence_whatever_the_data_are(config, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    model = save_tiny(tmp_path / "model", chat=True)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for data in ({}, {"dataset": "self_generated"}):
        message = fails(capsys, "run", "--config", str(config(model={"checkpoint": str(model)}, data=data)))
        assert "layers.2.mlp.up_proj.weight holds NaN" in message
