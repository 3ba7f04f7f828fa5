"""Where models come from: sharded folders, the hub's local cache, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton


def test_sharded_folder(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(str(tmp_path))
    single = load_file(llama / "model.safetensors")
    assert checkpoint.names() == sorted(single)
    for name, tensor in checkpoint.tensors(checkpoint.names()).items():
        assert torch.equal(tensor, single[name])
    next(iter(tmp_path.glob("*2-of*.safetensors"))).unlink()
    with pytest.raises(UserError, match="is missing"):
        open_checkpoint(str(tmp_path))


def test_hub_id_from_the_local_cache(llama, tmp_path):
    """Offline, a hub id is served from the cache that an earlier download filled."""
    home = tmp_path / "hub" / "models--someone--tiny"
    revision = "0" * 40
    shutil.copytree(llama, home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    code = (
        "from lfq_lightning.models.checkpoints import open_checkpoint; "
        "print(len(open_checkpoint('someone/tiny').names()))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(printed.stdout) == len(load_file(llama / "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "is quantised by hqq, which is not read here"),
        ({"model_type": "bert"}, "model type 'bert' cannot be taken apart"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "names BertForMaskedLM, which does not write text",
        ),
        ({"model_type": "new"}, r"transformers 5\S+ has no model type 'new'; upgrade transformers"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "configuration_new.New"}}, "such code is never run"),
    ],
)
def test_refused(llama, tmp_path, change, message):
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text()) | change
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(tmp_path / "model"))


def changed(llama, folder, change):
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(str(folder))


def test_norms_stored_wider_than_matrices(llama, tmp_path):
    def narrow(tensors):
        for name in tensors:
            tensors[name] = tensors[name] if "norm" in name else tensors[name].bfloat16()

    checkpoint = changed(llama, tmp_path / "model", narrow)
    assert checkpoint.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in checkpoint.tensors(checkpoint.names()).values()} == {torch.bfloat16}


def test_tensors_that_models_compute_or_tie_are_passed_over(llama, tmp_path):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    checkpoint = changed(llama, tmp_path / "model", add)
    assert checkpoint.names() == open_checkpoint(str(llama)).names()


def test_shapes_that_do_not_match_the_config(llama, tmp_path):
    def cut(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)

    checkpoint = changed(llama, tmp_path / "model", cut)
    with pytest.raises(
        UserError, match=r"layers.1.mlp.up_proj.weight has shape \(40, 32\), but its config says \(48, 32\)"
    ):
        ModelSkeleton(checkpoint)
