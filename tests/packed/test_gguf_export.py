"""GGUF files: block bytes against the gguf package, whole models through the reader, tokenizers, refusals."""

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lfq_lightning.errors import UserError
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.packed.gguf_blocks import block_type, blocks
from lfq_lightning.packed.gguf_export import export_gguf, llama3_factors
from lfq_lightning.packed.gguf_tokenizer import tokenizer_fields
from lfq_lightning.packed.load_model import load
from tests.helpers import byte_tokenizer, quantizer, random_tensor
from tests.packed.test_export import packed  # noqa: F401


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    blocks_a_group=st.integers(1, 3),
    groups=st.integers(1, 3),
    rows=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_blocks_are_the_weight(bits, symmetric, blocks_a_group, groups, rows, seed):
    """gguf's own dequantisation gives back (q - z)·s, exactly where no zero point is multiplied out."""
    scheme = IntegerGrid(bits, 32 * blocks_a_group, symmetric)
    if bits > 4 and not symmetric:
        return
    quantized = random_tensor(rows, 32 * blocks_a_group * groups, scheme, seed)
    kind = block_type("layer", scheme, quantized.codes.shape[1])
    theirs = torch.from_numpy(gguf.dequantize(blocks("layer", quantized), gguf.GGMLQuantizationType[kind]))
    steps = quantized.codes.view(rows, groups, -1).double() - quantized.zero_point.double()
    exact = (steps * quantized.scale.double()).flatten(1)
    if kind == "Q4_1":
        offset = (quantized.zero_point.double() * quantized.scale.double()).abs()
        bound = (offset * 2**-11 + 1e-7).expand(-1, -1, 32 * blocks_a_group).flatten(1)
        assert bool(((theirs.double() - exact).abs() <= bound + exact.abs() * 1e-6).all())
    else:
        assert torch.equal(theirs.double(), exact)


@pytest.mark.parametrize(
    ("scheme", "width", "message"),
    [
        (IntegerGrid(4, 16), 64, "groups of 16 inputs, but GGUF's blocks hold 32"),
        (IntegerGrid(4, -1), 48, "groups of 48 inputs"),
        (IntegerGrid(8, 32, symmetric=False), 64, "8 asymmetric bits"),
    ],
)
def test_what_no_block_holds(scheme, width, message):
    with pytest.raises(UserError, match=message):
        block_type("layer", scheme, width)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("bits", "tied"), [(4, True), (3, False), (8, True)])
def test_the_file_is_the_model(family, bits, tied, packed, tmp_path):  # noqa: F811
    """Read back as a checkpoint: names, rotary order, and every weight bit for bit in bf16."""
    plan = [{"match": "*.2.mlp.*", "quantizer": "fp"}, {"match": "all", "quantizer": quantizer(bits)}]
    if family == "mistral":
        with pytest.raises(UserError, match="sliding-window attention"):
            export_gguf(str(packed(plan, tied, torch.bfloat16, family)), str(tmp_path / "model.gguf"))
        return
    run = packed(plan, tied, torch.bfloat16, family)
    trained_tokenizer().save_pretrained(run)
    file = export_gguf(str(run), str(tmp_path / "model.gguf"))
    checkpoint, model = open_checkpoint(str(file)), load(run, dequantize=True)[0]
    state = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    if family != "qwen3":  # the reader of transformers takes its head width for 128
        assert checkpoint.names() == sorted(state)
        for name, value in checkpoint.tensors(checkpoint.names()).items():
            assert torch.equal(value, state[name]), name
    config = checkpoint.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (3, 64, 2)
    assert config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_the_tokenizer_comes_along(packed, tmp_path):  # noqa: F811
    """A byte-level BPE with merges, read back by transformers from the file."""
    run = packed([{"match": "all", "quantizer": quantizer(4)}])
    trained_tokenizer().save_pretrained(run)
    file = export_gguf(str(run), str(tmp_path / "model.gguf"))
    ours, theirs = AutoTokenizer.from_pretrained(run), open_checkpoint(str(file)).tokenizer()
    for line in ("green bottles fall", "12 345, don't!\n\n  x", "é 漢"):
        assert ours(line, add_special_tokens=False)["input_ids"] == theirs(line, add_special_tokens=False)["input_ids"]
    assert len(ours("green bottles")["input_ids"]) < 10


def test_refusals(packed, tmp_path):  # noqa: F811
    run = packed([{"match": "all", "quantizer": quantizer(4, 16)}])
    with pytest.raises(UserError, match="give a name that ends with"):
        export_gguf(str(run), str(tmp_path / "model"))
    with pytest.raises(UserError, match="groups of 16 inputs"):
        export_gguf(str(run), str(tmp_path / "model.gguf"))
    assert not list(tmp_path.glob("model.gguf*"))
    good = packed([{"match": "all", "quantizer": quantizer(4)}], overwrite=True)
    trained_tokenizer().save_pretrained(good)
    with pytest.raises(UserError, match="cannot be made"):
        export_gguf(str(good), str(tmp_path / "config.yaml" / "model.gguf"))


def test_other_models_are_refused(packed, tmp_path):  # noqa: F811
    run = packed([{"match": "all", "quantizer": quantizer(4)}], family="granite")
    with pytest.raises(UserError, match="models of type 'granite' are not written from nothing here, only llama"):
        export_gguf(str(run), str(tmp_path / "model.gguf"))


def test_llama_3_frequencies():
    """Against transformers: each plain frequency divided by our factor is its frequency."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(head_dim=128, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** (-torch.arange(0, 128, 2) / 128)
    factors = torch.from_numpy(llama3_factors(rope, 128))
    assert factors.min() == 1 and factors.max() == 8
    torch.testing.assert_close(plain / factors, theirs, rtol=1e-5, atol=0)


def trained_tokenizer():
    text = "green bottles hanging on the wall, and if one green bottle should fall, " * 3
    return byte_tokenizer(chat=False).train_new_from_iterator([text], vocab_size=290)


def test_tokenizer_fields():
    fields = tokenizer_fields(trained_tokenizer(), 300)
    assert (fields["model"], fields["pre"], fields["add_bos_token"]) == ("gpt2", "gpt-2", True)
    assert len(fields["tokens"]) == len(fields["token_type"]) == 300
    assert fields["tokens"][:4] == ["<s>", "</s>", "<u>", "<a>"] and fields["tokens"][290:292] == [
        "[PAD290]",
        "[PAD291]",
    ]
    assert fields["token_type"][:5] == [3, 3, 3, 3, 1] and fields["token_type"][289:291] == [1, 5]
    assert fields["bos_token_id"] == 0 and "padding_token_id" not in fields
    with pytest.raises(UserError, match="the tokenizer has no merges"):
        tokenizer_fields(byte_tokenizer(chat=False), 300)


def test_a_metaspace_puts_a_space_first():
    vocab = {letter: n for n, letter in enumerate("▁abc")} | {f"<0x{n:02X}>": 4 + n for n in range(256)} | {"ab": 260}
    for scheme, spaced in (("first", True), ("always", True), ("never", False)):
        inner = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], byte_fallback=True))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        fields = tokenizer_fields(PreTrainedTokenizerFast(tokenizer_object=inner), 261)
        assert fields["add_space_prefix"] is spaced, scheme
        assert spaced == (inner.encode("ab").tokens[0] == "▁")


def test_tokens_without_a_row_are_left_out(caplog):
    tokenizer = trained_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 290
    fields = tokenizer_fields(tokenizer, 290)  # llama.cpp refuses a file with more tokens than rows
    assert len(fields["tokens"]) == len(fields["token_type"]) == 290 and "padding_token_id" not in fields
    assert "GGUF: 1 tokens have no row in the embeddings" in caplog.text


def test_every_named_template_is_in_the_file(packed, tmp_path):  # noqa: F811
    run = packed([{"match": "all", "quantizer": quantizer(4)}])
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = {"default": "D", "tool_use": "T", "rag": "R"}
    tokenizer.save_pretrained(run)
    fields = gguf.GGUFReader(export_gguf(str(run), str(tmp_path / "model.gguf"))).fields
    found = {key: field.contents() for key, field in fields.items() if "chat_template" in key}
    assert found == {
        "tokenizer.chat_template": "D",
        "tokenizer.chat_template.rag": "R",
        "tokenizer.chat_template.tool_use": "T",
        "tokenizer.chat_templates": ["rag", "tool_use"],
    }
