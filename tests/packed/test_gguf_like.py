"""Packed models in copies of other GGUF files: against our own exporter, and against files written by hand."""

import re

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

from lfq_lightning.cli import main
from lfq_lightning.errors import UserError
from lfq_lightning.packed.gguf_export import export_gguf
from lfq_lightning.packed.gguf_like import _norm_offsets, export_like
from lfq_lightning.packed.load_model import load
from tests.helpers import quantizer
from tests.packed.test_export import packed  # noqa: F401
from tests.packed.test_gguf_export import trained_tokenizer

Q4_0 = [{"match": "all", "quantizer": {"name": "rtn", "grid": "q4_0"}}]
AWQ = [{"match": "all", "quantizer": {"name": "awq", "grid": "q4_1"}}]


def tensors_of(file):
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(file).tensors}


def fields_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("plan", [Q4_0, AWQ], ids=["rtn", "awq folded into norms and biases"])
def test_it_is_what_the_exporter_writes(family, plan, packed, tmp_path, capsys):  # noqa: F811
    """A file of another run of the model, on other grids: all of it is replaced, rows in the rotary order."""
    run = packed([{"match": "all", "quantizer": quantizer(8)}], True, torch.bfloat16, family)
    trained_tokenizer().save_pretrained(run)
    other = export_gguf(str(run), str(tmp_path / "other.gguf"))
    run = packed(plan, True, torch.bfloat16, family, overwrite=True)
    trained_tokenizer().save_pretrained(run)
    wanted = export_gguf(str(run), str(tmp_path / "wanted.gguf"))
    found = str(tmp_path / "found.gguf")
    main(["export", str(run), "--format", "gguf", "--output", found, "--like", str(other)])
    assert capsys.readouterr().out.splitlines()[-1] == found
    assert fields_of(found) == fields_of(wanted)
    here, there = tensors_of(found), tensors_of(wanted)
    assert here.keys() == there.keys()
    for name, (kind, data) in there.items():
        assert here[name][0] == kind and np.array_equal(here[name][1], data), name


def together(tensors):
    """Return tensors, each layer's experts as one (E, O, I)."""
    experts = {}
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        base, number, last = re.fullmatch(r"(.*)mlp\.experts\.(\d+)(\..*)", name).groups()
        experts.setdefault(f"{base}block_sparse_moe.experts{last}", {})[int(number)] = tensors.pop(name)
    return tensors | {name: torch.stack([parts[n] for n in sorted(parts)]) for name, parts in experts.items()}


def write_by_hand(model, architecture, path, change):
    """Write a model as llama.cpp's converter would: `change` gives a tensor the form that it has there."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in together(model.state_dict()).items():
        for part, value in change(name, tensor.float()).items():
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if stored is not None:
                writer.add_tensor(stored, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def around_zero(name, tensor):
    return {name: tensor + 1 if "norm" in name else tensor}


def mixtral(name, tensor):
    """transformers has gate and up of all experts in one tensor, (E, 2 F, D); llama.cpp two, and halves of q and k."""
    base, _, last = name.rpartition("mlp.experts.")
    if last == "gate_up_proj":
        gate, up = tensor.chunk(2, 1)
        return {f"{base}block_sparse_moe.experts.w1.weight": gate, f"{base}block_sparse_moe.experts.w3.weight": up}
    if last == "down_proj":
        return {f"{base}block_sparse_moe.experts.w2.weight": tensor}
    if "q_proj" in name or "k_proj" in name:
        heads = 4 if "q_proj" in name else 2
        tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    return {name.replace("mlp.gate", "block_sparse_moe.gate"): tensor}


def in_turn(name, tensor):
    """GPT-NeoX has q, k, v of head after head; llama.cpp has all q, all k, all v."""
    if "query_key_value" in name:
        tensor = torch.cat([tensor.view(4, 3, 16, -1)[:, part].reshape(64, -1) for part in range(3)])
        tensor = tensor[:, 0] if name.endswith("bias") else tensor
    return {name: tensor}


def as_it_is(name, tensor):
    return {name: tensor}


BY_HAND = {
    "gemma2": ("gemma2", around_zero),
    "starcoder2": ("starcoder2", as_it_is),
    "mixtral": ("llama", mixtral),
    "gpt_neox": ("gptneox", in_turn),
}


@pytest.mark.parametrize("family", BY_HAND)
@pytest.mark.parametrize("plan", [Q4_0, AWQ], ids=["rtn", "awq"])
def test_forms_that_the_converter_gives(family, plan, packed, tmp_path):  # noqa: F811
    """Norms around 0, biases, stacked experts, q, k, v in turn: the file is the model in the converter's form."""
    run = packed(plan, False, torch.float32, family)
    architecture, change = BY_HAND[family]
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    like = write_by_hand(source, architecture, tmp_path / "like.gguf", change)
    found = export_like(str(run), str(tmp_path / "found.gguf"), like)
    shipped = load(run, dequantize=True)[0].float()
    wanted = tensors_of(write_by_hand(shipped, architecture, tmp_path / "wanted.gguf", change))
    here = tensors_of(found)
    assert here.keys() == wanted.keys() and fields_of(found)["tokenizer.ggml.tokens"] == ["a", "b"]
    kinds = {kind for kind, _ in here.values()}
    assert kinds == {"F32", plan[0]["quantizer"]["grid"].upper()}
    for name, (_, value) in wanted.items():
        kind, data = here[name]
        dense = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(dense, value) or np.allclose(dense, value, rtol=1e-6, atol=1e-8), name


def test_another_number_of_experts(packed, tmp_path):  # noqa: F811
    run = packed(Q4_0, False, torch.float32, "mixtral")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    def fewer(name, tensor):
        return {n: t[:3] if t.dim() == 3 else t for n, t in mixtral(name, tensor).items()}

    like = write_by_hand(source, "llama", tmp_path / "like.gguf", fewer)
    with pytest.raises(UserError, match=r"has another number of experts in blk\.0\.ffn_"):
        export_like(str(run), str(tmp_path / "new.gguf"), like)


def test_what_norms_add():
    """Against what each class does: Gemma's multiplies by 1 + w, a gated one and a LayerNorm by w."""
    gated = qwen3_5.Qwen3_5RMSNormGated(8)
    norms = {gemma2.Gemma2RMSNorm(8): 1.0, torch.nn.LayerNorm(8): 0.0, gated: 0.0, llama.LlamaRMSNorm(8): 0.0}
    model = torch.nn.ModuleList(norms)
    model.add_module("other", torch.nn.Linear(8, 8))
    assert _norm_offsets(model) == {str(n): offset for n, offset in enumerate(norms.values())}


def test_refusals(packed, tmp_path, capsys):  # noqa: F811
    run = packed(Q4_0, False, torch.float32, "qwen2")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    def refused(change, message, architecture="qwen2"):
        like = write_by_hand(source, architecture, tmp_path / "like.gguf", change)
        with pytest.raises(UserError, match=message):
            export_like(str(run), str(tmp_path / "new.gguf"), like)
        assert not list(tmp_path.glob("new.gguf*"))

    refused(lambda n, t: {n: t.flip(0) if "up_proj" in n else t}, "nor that with its rows in an order that is known")
    refused(lambda n, t: {n: t * 2 if n == "model.norm.weight" else t}, "the final norm of .* is not the model's")
    refused(lambda n, t: {n: t[:, :32] if "k_proj.w" in n else t}, "in shape .* and .* it is of another model")
    refused(lambda n, t: {} if "up_proj" in n else {n: t}, "has no tensor for model.layers.0.mlp.up_proj")
    for arguments, message in (
        (["--format", "mlx", "--like", "x.gguf"], "--like goes with --format gguf only"),
        (["--format", "gguf", "--like", str(tmp_path / "config.yaml")], "cannot be read as GGUF"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(run), "--output", str(tmp_path / "new.gguf"), *arguments])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
