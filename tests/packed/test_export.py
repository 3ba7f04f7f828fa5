"""Packed folders: converting, inspecting, loading, talking; and damage."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, pipeline

import lfq_lightning
from lfq_lightning.cli import main
from lfq_lightning.errors import UserError
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.packed.engines import fused_differently
from lfq_lightning.packed.export import export
from lfq_lightning.packed.load_model import load
from lfq_lightning.packed.packed_folder import PackedFolder
from lfq_lightning.packed.packed_linear import PackedLinear
from tests.helpers import quantizer, save_tiny

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture
def packed(config, tmp_path):
    """Return a function that quantises a tiny model by rtn and returns the run's folder."""

    def make(plan, tied=True, dtype=torch.float16, family="llama", chat=False, overwrite=False):
        model = save_tiny(tmp_path / "model", family, tied=tied, chat=chat, dtype=dtype, **WIDE)
        (model / "LICENSE").write_text("as you like")
        main(["run", "--config", str(config(model={"checkpoint": str(model)}, plan=plan, overwrite=overwrite))])
        return tmp_path / "run"

    return make


CASES = {
    **{f"gptq w{bits}": ("gptq", quantizer(bits)) for bits in (2, 3, 4, 8)},
    **{f"gptq_v2 w{bits} asymmetric": ("gptq_v2", quantizer(bits, symmetric=False)) for bits in (2, 3, 4, 8)},
    "gptq_v2 per channel": ("gptq_v2", quantizer(4, -1)),
    "awq": ("awq", quantizer(4, symmetric=False)),
    "awq symmetric": ("awq", quantizer(4, 16)),
    "awq, folded by awq": ("awq", {**quantizer(4, symmetric=False), "name": "awq"}),
    **{f"mlx w{bits}": ("mlx", quantizer(bits)) for bits in (2, 3, 4, 5, 6, 8)},
    "compressed-tensors": ("compressed-tensors", quantizer(5)),
}


@pytest.mark.parametrize("case", CASES)
def test_export_keeps_every_weight(case, packed, tmp_path, capsys):
    name, scheme = CASES[case]
    run = packed([{"match": "all", "quantizer": scheme}], tied=name != "awq")
    main(["export", str(run), "--format", name, "--output", str(tmp_path / "new")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "new")
    before, after = (load(folder, dequantize=True)[0].state_dict() for folder in (run, tmp_path / "new"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    for file in ("LICENSE", "README.md", "metrics.json", "lfq.yaml"):
        assert (tmp_path / "new" / file).is_file()
    assert not (tmp_path / "new" / "journal.jsonl").exists()
    text = "a few words"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (run, tmp_path / "new")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    if name == "mlx":  # its minima are of no integer grid
        return
    main(["export", str(tmp_path / "new"), "--format", "compressed-tensors", "--output", str(tmp_path / "back")])
    back = load(tmp_path / "back", dequantize=True)[0].state_dict()
    assert all(torch.equal(value, back[key]) for key, value in before.items())


def test_mixed_schemes_and_dense_layers_go_to_gptq(packed, tmp_path):
    plan = [
        {"match": "*.0.mlp.down_proj", "quantizer": quantizer(8)},
        {"match": ["*.q_proj", "*.k_proj", "*.v_proj", "*.mlp.*"], "quantizer": quantizer(4)},
    ]
    run = packed(plan)
    main(["export", str(run), "--format", "gptq_v2", "--output", str(tmp_path / "new")])
    before, after = PackedFolder(run), PackedFolder(tmp_path / "new")
    assert before.schemes == after.schemes
    assert before.dense == after.dense and "model.layers.2.self_attn.o_proj" in after.dense
    for a, b in zip(before.shards(), after.shards(), strict=True):
        assert a.layers.keys() == b.layers.keys()
        assert all(torch.equal(a.layers[n].dequantize(), b.layers[n].dequantize()) for n in a.layers)
    with pytest.raises(UserError, match="8 bits, but awq holds 4 only"):
        export(str(run), "awq", str(tmp_path / "awq"))


def test_a_refused_export_leaves_nothing(packed, tmp_path):
    run = packed([{"match": "all", "quantizer": quantizer(3, symmetric=False)}])
    with pytest.raises(UserError, match="zero point of 0"):
        export(str(run), "gptq", str(tmp_path / "new"))
    with pytest.raises(UserError, match="unknown format 'gtpq': did you mean 'gptq'"):
        export(str(run), "gtpq", str(tmp_path / "new"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml", "model", "run"]
    with pytest.raises(UserError, match="exists; give a new folder"):
        export(str(run), "gptq_v2", str(run))
    with pytest.raises(UserError, match="cannot be written"):
        export(str(run), "gptq_v2", str(tmp_path / "config.yaml" / "new"))
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match=r"new\.partial is left of an export"):
        export(str(run), "gptq_v2", str(tmp_path / "new"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # qwen2 has biases
def test_packed_layers_compute_what_dense_ones_do(family, dtype, packed):
    run = packed([{"match": "all", "quantizer": quantizer(3)}], dtype=dtype, family=family, tied=False)
    ours, dense = lfq_lightning.load(run)[0], load(run, dequantize=True)[0]
    assert sum(isinstance(module, PackedLinear) for module in ours.modules()) == 21
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = [model(tokens).logits.float() for model in (ours, dense)]
        exact = dense.float()(tokens).logits
    errors = [float((value - exact).norm() / exact.norm()) for value in logits]
    assert errors[0] <= 1.5 * errors[1] + 1e-6  # as far from fp32 as the dense model in its own dtype
    output = ours.generate(tokens[:, :5], do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert output.shape == (1, 9)
    speaker = pipeline("text-generation", model=ours, tokenizer=AutoTokenizer.from_pretrained(run))
    assert speaker("ab", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("ab")


def test_a_layer_spread_over_two_shards(packed, tmp_path):
    """As tools that cut shards by size leave it."""
    run = packed([{"match": "all", "quantizer": quantizer(3)}])
    wanted = load(run, dequantize=True)[0].state_dict()
    first, second = (load_file(run / f"model-0000{i}-of-00004.safetensors") for i in (2, 3))
    moved = f"{NAME}.weight_scale"
    second[moved] = first.pop(moved)
    for i, tensors in ((2, first), (3, second)):
        save_file(tensors, run / f"model-0000{i}-of-00004.safetensors")

    def reindex(index):
        index["metadata"].pop("sha256")
        index["weight_map"][moved] = "model-00003-of-00004.safetensors"

    edit_json(run / "model.safetensors.index.json", reindex)
    found = load(run, dequantize=True)[0].state_dict()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_inspect(packed, capsys):
    run = packed([{"match": "*.v_proj", "quantizer": quantizer(8)}, {"match": "all", "quantizer": quantizer(3)}])
    capsys.readouterr()
    main(["inspect", str(run)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "compressed_tensors" in shown and "not packed: lm_head" in shown
    assert "model.layers.0.self_attn.v_proj have different schemes" in shown
    assert "loads in: lfq_lightning, transformers" in shown and "vLLM (" not in shown


def test_layers_that_vllm_fuses():
    four, three = IntegerGrid(4), IntegerGrid(3)
    assert fused_differently({"a.q_proj": four, "a.k_proj": four, "a.v_proj": four, "a.o_proj": three}, []) == []
    assert fused_differently({"a.gate_proj": four, "a.up_proj": three}, []) == ["a.gate_proj", "a.up_proj"]
    assert fused_differently({"a.gate_proj": four}, ["a.up_proj"]) == ["a.gate_proj", "a.up_proj"]


def test_generate_chat_and_bench(packed, capsys, monkeypatch):
    run = packed([{"match": "all", "quantizer": quantizer(4)}], chat=True)
    capsys.readouterr()
    main(["generate", str(run), "hello", "--max-new-tokens", "5"])
    first = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand now?\n\nnot read\n"))
    main(["chat", str(run), "--max-new-tokens", "5"])
    said = capsys.readouterr().out
    assert said.startswith(first.rstrip("\n")) and len(said) > len(first)
    main(["bench", str(run), "--prompt-tokens", "8", "--new-tokens", "3"])
    assert "ratio" in capsys.readouterr().out


def test_chat_needs_a_template(packed):
    run = packed([{"match": "all", "quantizer": quantizer(4)}])
    with pytest.raises(SystemExit):
        main(["chat", str(run)])


# ---- damage ------------------------------------------------------------------------------------------------------


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


SHARD = "model-00002-of-00004.safetensors"
NAME = "model.layers.0.mlp.up_proj"


def flip_a_bit(run):
    content = bytearray((run / SHARD).read_bytes())
    content[-5] ^= 4
    (run / SHARD).write_bytes(content)


def truncate(run):
    (run / SHARD).write_bytes((run / SHARD).read_bytes()[:-100])


def rewrite(change):
    def damage(run):
        tensors = load_file(run / SHARD)
        change(tensors)
        save_file(tensors, run / SHARD)
        edit_json(run / "model.safetensors.index.json", lambda index: index["metadata"].pop("sha256"))

    return damage


def group(key, value):
    return lambda run: edit_json(
        run / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update({key: value}),
    )


DAMAGE = {
    "a flipped bit": (flip_a_bit, "is not what was written"),
    "truncated": (truncate, "is not what was written"),
    "no shard": (lambda run: (run / SHARD).unlink(), "cannot be read"),
    "no config": (lambda run: (run / "config.json").unlink(), "no config.json"),
    "half a config": (lambda run: (run / "config.json").write_text('{"a'), "config or index is damaged"),
    "no index": (lambda run: (run / "model.safetensors.index.json").unlink(), "neither model.safetensors.index.json"),
    "a path in the index": (
        lambda run: edit_json(
            run / "model.safetensors.index.json", lambda i: i["weight_map"].update({f"{NAME}.weight_scale": "../x"})
        ),
        "is no file name",
    ),
    "no scale": (rewrite(lambda t: t.pop(f"{NAME}.weight_scale")), "has no tensor .*up_proj.weight_scale"),
    "another shape": (
        rewrite(lambda t: t.update({f"{NAME}.weight_scale": torch.zeros(3, 3)})),
        r"weight_scale is \(3, 3\), but by config.json it would be \(96, 2\)",
    ),
    "act-order": (
        rewrite(lambda t: t.update({f"{NAME}.weight_g_idx": torch.zeros(64)})),
        "holds .*weight_g_idx, which",
    ),
    "other bits": (group("num_bits", 4), "config and shards do not belong together"),
    "other groups": (group("group_size", 48), "groups of 48 do not divide the 64 inputs"),
    "floats": (group("type", "float"), "only integers in plain groups are read here"),
    "no groups": (
        lambda run: edit_json(run / "config.json", lambda c: c["quantization_config"].pop("config_groups")),
        "quantization_config is damaged",
    ),
    "another method": (
        lambda run: edit_json(run / "config.json", lambda c: c["quantization_config"].update(quant_method="exl2")),
        "is quantised by exl2, which is not read here; known: awq",
    ),
    "not packed": (
        lambda run: edit_json(run / "config.json", lambda c: c.pop("quantization_config")),
        "is not packed",
    ),
    "another model": (
        lambda run: edit_json(run / "config.json", lambda c: c.update(num_hidden_layers=2, layer_types=None)),
        "its config knows nothing of",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from tests.callbacks.test_scheduler import Rule, calibrate

    folder = tmp_path_factory.mktemp("damage")
    model = save_tiny(folder / "model", dtype=torch.float16, **WIDE)
    text = folder / "text.txt"
    text.write_text("<|endoftext|>".join(f"{i} green bottles hanging on wall {i}; " * 3 for i in range(40)))
    calibrate(model, text, folder / "run", rules=[Rule("all", quantizer(3))])
    return folder / "run"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(damage, whole, tmp_path, capsys):
    for file in whole.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    change, message = DAMAGE[damage]
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)
    with pytest.raises(SystemExit) as exit_code:
        main(["inspect", str(tmp_path)])
    assert exit_code.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("lfq: error: ") and len(shown.splitlines()) == 1


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_exports_of_every_dtype_generate_and_are_measured(packed, tmp_path, capsys, form, dtype):
    """Scales in fp16 stand beside weights in bf16 or fp32."""
    run = packed([{"match": "all", "quantizer": quantizer(4)}], dtype=dtype)
    export(str(run), form, str(tmp_path / "new"))
    capsys.readouterr()
    main(["generate", str(tmp_path / "new"), "hello", "--max-new-tokens", "4"])
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [load(folder)[0](ids).logits.float() for folder in (run, tmp_path / "new")]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.05, atol=0.05 * float(logits[0].abs().max()))
    if form != "gptq":
        return
    text = tmp_path / "text.txt"
    text.write_text("a few words of text, " * 20)
    options = ["--text", str(text), "--windows", "1", "--seq-len", "32", "--new-tokens", "0", "--packed"]
    main(["eval", str(tmp_path / "new"), "--reference", str(tmp_path / "model"), *options])
    assert "kl" in capsys.readouterr().out


MIXED = {
    "first block 8 bits": [{"match": 0, "quantizer": quantizer(8)}, {"match": "all", "quantizer": quantizer(4)}],
    "first block dense": [{"match": ["model.layers.[12].*"], "quantizer": quantizer(4)}],
    "down_proj 8 bits": [
        {"match": "*.down_proj", "quantizer": quantizer(8)},
        {"match": "all", "quantizer": quantizer(4)},
    ],
}


@pytest.mark.parametrize("plan", MIXED)
def test_gptq_has_rules_for_what_vllm_merges(plan, packed, tmp_path, capsys):
    """vLLM asks for qkv_proj and gate_up_proj, and takes the first rule that matches, else the common scheme."""
    run = packed(MIXED[plan])
    export(str(run), "gptq", str(tmp_path / "new"))
    folder = PackedFolder(tmp_path / "new")
    for block in range(3):
        for fused, part in (("self_attn.qkv_proj", "self_attn.q_proj"), ("mlp.gate_up_proj", "mlp.up_proj")):
            scheme = folder.schemes.get(f"model.layers.{block}.{part}")
            name = f"model.layers.{block}.{fused}"
            hit = next(((k, v) for k, v in folder.quantization["dynamic"].items() if re.match(k[2:], name)), None)
            bits = folder.quantization["bits"] if hit is None else None if hit[0][0] == "-" else hit[1]["bits"]
            assert bits == (scheme.num_bits if scheme else None), name
    main(["inspect", str(tmp_path / "new")])
    assert "vLLM" in capsys.readouterr().out


SCALING = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", SCALING)
def test_rope_is_written_for_older_readers_too(kind, config, tmp_path):
    model, scaling = save_tiny(tmp_path / "model", **WIDE), {"rope_type": kind, **SCALING[kind]}
    settings = json.loads((model / "config.json").read_text())
    settings.pop("rope_parameters", None)
    (model / "config.json").write_text(json.dumps(settings | {"rope_theta": 5e4, "rope_scaling": scaling}))
    main(
        ["run", "--config", str(config(model={"checkpoint": str(model)}, plan=[{"match": "all", "quantizer": "rtn"}]))]
    )
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["rope_theta"] == 5e4
    assert {key: value for key, value in written["rope_scaling"].items() if key in scaling} == scaling
    both = [AutoConfig.from_pretrained(folder).rope_parameters for folder in (model, tmp_path / "run")]
    assert {key: both[1][key] for key in both[0]} == both[0]


def test_an_export_without_room_leaves_nothing(packed, tmp_path, capsys):
    run = packed([{"match": "all", "quantizer": quantizer(4)}])
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from lfq_lightning.cli import main; main()"
    for form, output in (("gptq", "new"), ("compressed-tensors", "other")):
        command = [sys.executable, "-c", code, "export", str(run), "--format", form, "--output", str(tmp_path / output)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2 and "cannot be written" in ended.stderr and "Traceback" not in ended.stderr
        assert not list(tmp_path.glob(f"{output}*"))


def test_paths_of_every_kind(packed, tmp_path, capsys):
    run = packed([{"match": "all", "quantizer": quantizer(4)}])
    odd = tmp_path / "мои [v1/b] 量化 {0}%20#"
    odd.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run, odd)
    main(["inspect", str(odd)])
    assert "".join(str(odd).split()) in "".join(capsys.readouterr().out.split())  # a long title is wrapped at a space
    named = tmp_path / "model.v1.gguf"
    shutil.copytree(tmp_path / "model", named)
    from lfq_lightning.models.checkpoints import open_checkpoint

    assert open_checkpoint(str(named)).names() == open_checkpoint(str(tmp_path / "model")).names()
