"""Runs on llama.cpp's grids: what is trained is what the GGUF file holds."""

import gguf
import pytest
import torch

from lfq_lightning.cli import main
from lfq_lightning.errors import UserError
from lfq_lightning.grids import GRIDS
from lfq_lightning.packed.export import export
from lfq_lightning.packed.load_model import load
from lfq_lightning.plan import Plan
from lfq_lightning.stages import Rule
from tests.helpers import save_tiny
from tests.packed.test_gguf_export import trained_tokenizer

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
GGML = [name for name in GRIDS.names() if GRIDS.get(name).format == "ggml"]


@pytest.fixture
def run(config, tmp_path):
    def make(plan, family="qwen2", **changes):
        model = save_tiny(tmp_path / "model", family, dtype=torch.bfloat16, **WIDE, num_hidden_layers=2)
        trained_tokenizer().save_pretrained(model)
        main(["run", "--config", str(config(model={"checkpoint": str(model)}, plan=plan, **changes))])
        return tmp_path / "run"

    return make


def tensors(file):
    """Return every tensor of a GGUF file as its reader gives it: type and dequantised values."""
    return {
        tensor.name: (tensor.tensor_type.name, torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(file).tensors
    }


def test_a_file_of_every_type(run, tmp_path, capsys):
    """Each layer on another grid, its values in the file those of the run, bit for bit."""
    layers = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    layers += [f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qkvo"]
    plan = [
        {"match": layer, "quantizer": {"name": "rtn", "grid": GGML[number % len(GGML)]}}
        for number, layer in enumerate(layers)
    ]
    folder = run(plan)
    main(["export", str(folder), "--format", "gguf", "--output", str(tmp_path / "model.gguf")])
    found, model = tensors(tmp_path / "model.gguf"), load(folder, dequantize=True)[0].float()
    names = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {f"self_attn.{part}_proj": f"attn_{'output' if part == 'o' else part}" for part in "qkvo"}
    for number, layer in enumerate(layers):
        _, _, block, part = layer.split(".", 3)
        kind, values = found[f"blk.{block}.{names[part]}.weight"]
        assert kind == GGML[number % len(GGML)].upper()
        weight = model.get_submodule(layer).weight  # bf16 where the CPU multiplies that faster
        assert torch.equal(values, weight) or torch.equal(values.bfloat16().float(), weight), layer
    main(["inspect", str(folder)])
    shown = capsys.readouterr().out
    assert "q3_k" in shown and "llama.cpp" in shown
    with pytest.raises(UserError, match=r"is on the grid .*, which compressed_tensors cannot hold"):
        export(str(folder), "compressed-tensors", str(tmp_path / "other"))


def test_embeddings_and_head_in_the_file(run, tmp_path):
    plan = [
        {"match": "embeddings", "quantizer": {"name": "rtn", "grid": "q6_k"}},
        {"match": "all", "quantizer": {"name": "rtn", "grid": "q4_k"}},
    ]
    folder = run(plan)
    main(["export", str(folder), "--format", "gguf", "--output", str(tmp_path / "model.gguf")])
    kind, values = tensors(tmp_path / "model.gguf")["token_embd.weight"]
    weight = load(folder)[0].get_input_embeddings().weight
    assert kind == "Q6_K"
    assert torch.equal(values, weight) or torch.equal(values.bfloat16().float(), weight)


def test_grids_as_in_a_file(run, tmp_path, capsys):
    """A second run trains each layer on the grid that the file of the first has for it; the rest stays as it was."""
    plan = [
        {"match": "embeddings", "quantizer": {"name": "rtn", "grid": "q8_0"}},
        {"match": "*.down_proj", "quantizer": {"name": "rtn", "grid": "q6_k"}},
        {"match": "*.o_proj", "quantizer": "fp"},
        {"match": "all", "quantizer": {"name": "rtn", "grid": "q3_k"}},
    ]
    file = tmp_path / "model.gguf"
    main(["export", str(run(plan)), "--format", "gguf", "--output", str(file)])
    like = [
        {"match": "embeddings", "quantizer": {"name": "rtn", "grid": str(file)}},
        {"match": "all", "quantizer": {"name": "gptq", "grid": str(file)}},
    ]
    folder = run(like, overwrite=True)
    main(["export", str(folder), "--format", "gguf", "--output", str(tmp_path / "again.gguf")])
    first, second = tensors(file), tensors(tmp_path / "again.gguf")
    assert {name: kind for name, (kind, _) in first.items()} == {name: kind for name, (kind, _) in second.items()}
    assert not torch.equal(first["blk.0.ffn_down.weight"][1], second["blk.0.ffn_down.weight"][1])
    file.write_bytes(b"no GGUF")
    with pytest.raises(SystemExit):
        run(like, overwrite=True)
    assert "cannot be read as GGUF" in capsys.readouterr().err


def test_trained_on_k_quants(run, tmp_path):
    """Learned rounding on the file's own grid beats rounding to nearest, and a second run gives the same bytes."""

    def plan(name):
        trained = {"name": name, "grid": "q2_k"}
        return [{"match": "all", "quantizer": trained, "steps": 30, "objective": "mse"}]

    losses = []
    for name in ("rtn", "adaround", "adaround"):
        folder = run(plan(name), overwrite=True)
        shards = b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))
        losses.append((name, load(folder, dequantize=True)[0], shards))
    assert losses[1][2] == losses[2][2]
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize(
    ("quantizers", "message"),
    [
        ([{"grid": "q9"}], "unknown grid 'q9'"),
        ([{"grid": "q3_k", "bits": 3}], "grid q3_k has bits and groups of its own; omit bits"),
        ([{"grid": "q3_k"}, {"grid": "nvfp4"}], r"is stored as ggml and .* as compressed_tensors.*Of ggml: iq4_nl"),
        ([{"grid": "q3_k"}, {"bits": 4}], "take grids of one"),
        ([{"grid": "q3_k", "name": "gptq", "act_order": "group"}], "q3_k stores several together; use static"),
    ],
)
def test_grids_that_cannot_be(quantizers, message):
    named = [{"name": "rtn", **quantizer} for quantizer in quantizers]
    with pytest.raises(UserError, match=message):
        Plan([Rule(match, quantizer) for match, quantizer in zip((1, "all"), named, strict=False)])


def test_a_width_that_256_does_not_divide(config, capsys):
    rule = {"match": "all", "quantizer": {"name": "rtn", "grid": "q4_k"}}
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(config(plan=[rule]))])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "plan[0]: grid q4_k stores 256 inputs together, which do not divide the 32 of model.layers.0" in said
    assert "What fits all its block's layers: nvfp4." in said
