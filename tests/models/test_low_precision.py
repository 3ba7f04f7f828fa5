"""Models whose weights are quantised already: what they stand for, by hand, is the reference of a run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lfq_lightning
from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.packed.export import export
from tests.helpers import GPTQ, fails, run, save_tiny

Q = "model.layers.0.self_attn.q_proj.weight"
FP8 = torch.float8_e4m3fn


def quantised(folder, config, change):
    """Rewrite a tiny model's tensors, and say so in its config."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return folder


def in_blocks(tensors, rows=20, columns=16):
    """DeepSeek's: one scale for a block of rows and columns, the last ones smaller."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        o, i = tensors[name].shape
        scale = torch.rand(-(-o // rows), -(-i // columns), generator=torch.Generator().manual_seed(o)) + 0.5
        found |= {name: tensors[name].to(FP8), f"{name}_scale_inv": scale}
    return found


def test_fp8_in_blocks(config, tmp_path):
    method = {"quant_method": "fp8", "weight_block_size": [20, 16], "activation_scheme": "dynamic"}
    folder = quantised(save_tiny(tmp_path / "model"), method, in_blocks)
    stored, checkpoint = load_file(folder / "model.safetensors"), open_checkpoint(str(folder))
    weight, scale = stored[Q], stored[f"{Q}_scale_inv"]
    expected = torch.tensor(
        [[float(weight[o, i]) * float(scale[o // 20, i // 16]) for i in range(32)] for o in range(32)]
    ).to(torch.bfloat16)
    found = checkpoint.tensors([Q])[Q]
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert not any("scale" in name for name in checkpoint.names())

    path = config(model={"checkpoint": str(folder)}, plan=[{"match": "all", "quantizer": {**GPTQ, "bits": 8}}])
    run(path)
    output = path.parent / "run"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["reference"] == "weights dequantised from fp8"
    assert "weights dequantised from fp8" in (output / "README.md").read_text()
    assert metrics["quantized"]["held_out"]["kl"] < 0.01
    model, _ = lfq_lightning.load(output, dequantize=True)
    assert torch.allclose(model.get_parameter(Q).float(), expected.float(), atol=0.02)


@pytest.mark.parametrize("shape", [(), (1,), (32, 1)])
def test_fp8_by_tensor_and_by_row(tmp_path, shape):
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5

    def change(tensors):
        return tensors | {Q: tensors[Q].to(FP8), f"{Q}_scale": scale, Q.replace("weight", "input_scale"): torch.ones(1)}

    method = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    folder = quantised(save_tiny(tmp_path / "model"), method, change)
    expected = (load_file(folder / "model.safetensors")[Q].float() * scale).to(torch.bfloat16)
    assert torch.equal(open_checkpoint(str(folder)).tensors([Q])[Q], expected)


def test_scales_that_do_not_fit_are_refused(tmp_path):
    method = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    folder = quantised(save_tiny(tmp_path / "model"), method, lambda t: in_blocks(t, 8, 8))
    with pytest.raises(UserError, match=r"scale_inv is \(4, 4\), which does not fit \(32, 32\) weights"):
        open_checkpoint(str(folder)).tensors([Q])


def test_mxfp4(tmp_path):
    """Two values of E2M1 in a byte, low half first, under one power of two for 32; the model holds (E, I, O)."""
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    levels += [-level for level in levels]
    generator = torch.Generator().manual_seed(0)
    name, sizes = "model.layers.0.mlp.experts.gate_up_proj", {"num_local_experts": 2, "num_experts_per_tok": 1}

    def change(tensors):
        experts, inputs, outputs = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 130, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        return {**rest, f"{name}_blocks": blocks, f"{name}_scales": scales}

    folder = save_tiny(tmp_path / "model", "gpt_oss", tied=False, **sizes)
    quantised(folder, {"quant_method": "mxfp4"}, change)
    stored, found = load_file(folder / "model.safetensors"), open_checkpoint(str(folder)).tensors([name])[name]
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    for e, o, i in ((0, 0, 0), (1, 5, 1), (0, 95, 30), (1, 47, 31), (1, 95, 17)):
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        code = byte >> 4 if i % 2 else byte & 15
        assert float(found[e, i, o]) == levels[code] * 2.0 ** (int(scales[e, o, i // 32]) - 127)


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_a_packed_model_can_be_quantised_anew(config, tmp_path, format_name, capsys):
    eight = [{"match": "all", "quantizer": {**GPTQ, "bits": 8}}]
    path = config(plan=eight)
    run(path)
    source = path.parent / "run"
    if format_name != "compressed-tensors":
        export(str(source), format_name, str(tmp_path / "other"))
        source = tmp_path / "other"
    own, _ = lfq_lightning.load(source, dequantize=True)
    checkpoint = open_checkpoint(str(source))
    for name, tensor in checkpoint.tensors(checkpoint.names()).items():
        assert torch.equal(tensor.float(), own.get_parameter(name).float()), name
    run(
        config(
            model={"checkpoint": str(source)}, plan=[{"match": "all", "quantizer": GPTQ}], output=str(tmp_path / "anew")
        )
    )
    metrics = json.loads((tmp_path / "anew" / "metrics.json").read_text())
    assert metrics["reference"].startswith("weights dequantised from ")
    shard = next(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    message = fails(
        capsys, "run", "--config", str(config(model={"checkpoint": str(source)}, output=str(tmp_path / "x")))
    )
    assert "copy the model again" in message
