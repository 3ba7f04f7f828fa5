"""GGUF files written here and read both by us, lazily, and by transformers, whole."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from tests.helpers import save_tiny

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def interleave(weight, heads):
    """llama.cpp's order of the rotary halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(folder, path, architecture="llama"):
    """Write a tiny safetensors model as GGUF, as llama.cpp's converter would."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(300)
    writer.add_sliding_window(8)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], 3)
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, 4 if "q_proj" in name else 2)
        if architecture == "gemma3" and "norm" in name:
            array = array + 1
        quantised = array.ndim == 2 and "proj" in name and array.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q4_1 if quantised else gguf.GGMLQuantizationType.F32
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_same_weights_as_transformers(tmp_path, family, tied):
    # transformers' reader of Qwen3 files knows no head width but 128.
    changes = {"head_dim": 128} if family == "qwen3" else {}
    write(save_tiny(tmp_path / "model", family, tied=tied, **changes), tmp_path / "model.gguf", ARCHITECTURES[family])
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    assert checkpoint.config.model_type == family
    assert checkpoint.config.tie_word_embeddings == tied
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    names = checkpoint.names()
    assert set(expected) - set(names) == ({"lm_head.weight"} if tied else set())
    for name, tensor in checkpoint.tensors(names).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name


def test_broken_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF?" * 100)
    with pytest.raises(UserError, match="not a readable GGUF"):
        open_checkpoint(str(tmp_path / "x.gguf"))
    write(save_tiny(tmp_path / "model"), tmp_path / "model.gguf")
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match="no tensor"):
        checkpoint.tensors(["model.layers.9.mlp.up_proj.weight"])


def test_an_architecture_that_lies_otherwise_on_disk_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "bloom.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="'bloom' lie otherwise in GGUF than in the model"):
        open_checkpoint(str(tmp_path / "bloom.gguf"))
