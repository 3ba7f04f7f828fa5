"""What is quantised is the model that transformers loads from the folder, or it is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from tests.helpers import save_tiny


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model", "llama", tied=False)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def same_as_transformers(folder):
    checkpoint = open_checkpoint(str(folder))
    ModelSkeleton(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=checkpoint.dtype).state_dict()
    ours = checkpoint.tensors(checkpoint.names())
    assert set(theirs) - set(ours) <= {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_single_file_goes_before_an_old_index(folder, tmp_path, caplog):
    old = save_tiny(tmp_path / "old", "llama", tied=False, vocab_size=300, rms_norm_eps=1e-5)
    model = AutoModelForCausalLM.from_pretrained(old)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for file in (tmp_path / "shards").glob("model-*"):
        file.rename(folder / file.name)
    (tmp_path / "shards" / "model.safetensors.index.json").rename(folder / "model.safetensors.index.json")
    same_as_transformers(folder)
    assert "model.safetensors is read, as transformers does" in caplog.text


def test_shards_are_what_their_index_lists(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    same_as_transformers_of(tmp_path / "shards", folder)


def same_as_transformers_of(shards, folder):
    for file in folder.glob("token*"):
        (shards / file.name).write_bytes(file.read_bytes())
    same_as_transformers(shards)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}, "which is not in its folder"),
        ({"weight_map": {"model.norm.weight": "/etc/passwd"}}, "which is not in its folder"),
        ({"weight_map": {}}, "names no files"),
        ([], "is no index"),
        ({"weight_map": {"model.norm.weight": 3}}, "is no index"),
    ],
    ids=str,
)
def test_an_index_that_points_elsewhere(folder, index, message):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(folder))


def test_an_adapter_is_not_ignored(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        open_checkpoint(str(folder))


def test_a_head_of_its_own_under_a_config_that_says_tied(folder):
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"says tie_word_embeddings, but lm_head.weight is stored"):
        open_checkpoint(str(folder))

    def tie(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    edit_weights(folder, tie)
    same_as_transformers(folder)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64], ids=str
)
def test_a_dtype_without_a_meaning(folder, dtype):
    edit_weights(folder, lambda tensors: {**tensors, Q: tensors[Q].to(dtype)})
    with pytest.raises(UserError, match=rf"{Q} is stored as \w+, a dtype without a meaning here"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: v for name, v in t.items() if name != Q}, f"has no tensor {Q}"),
        (lambda t: {**t, "model.layers.9.mlp.up_proj.weight": t[Q].clone()}, "holds a tensor model.layers.9"),
        (lambda t: {**t, Q: t[Q][:-1].clone()}, f"{Q} has shape"),
    ],
    ids=["one less", "one more", "another shape"],
)
def test_tensors_are_those_of_the_config_before_anything_is_computed(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(UserError, match=message):
        ModelSkeleton(open_checkpoint(str(folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_found_wherever_it_is(folder, value):
    def spoil(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][1, 2] = value
        return tensors

    edit_weights(folder, spoil)
    with pytest.raises(UserError, match=r"layers.2.mlp.down_proj.weight holds NaN or infinity"):
        open_checkpoint(str(folder)).check_finite()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -64},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "5"},
        {"hidden_act": "foo"},
        {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=r"config\.json"):
        ModelSkeleton(open_checkpoint(str(folder)))


def test_what_training_scripts_leave_in_a_config(folder):
    edit_config(folder, _attn_implementation="flash_attention_2", attn_implementation="flash_attention_2")
    edit_config(folder, quantization_config=None, attention_dropout=0.5)
    ModelSkeleton(open_checkpoint(str(folder)))
