"""What tests share: tiny random models of each family with a byte tokenizer, runs, and the ways that runs end."""

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from lfq_lightning.callbacks import BlockCallback
from lfq_lightning.cli import main
from lfq_lightning.quantized_tensor import QuantizedTensor

ROOT = Path(__file__).parents[1]


CHAT_TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}


EXTRA: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma2": {
        "sliding_window": 8,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "bloom": {"n_head": 4, "n_layer": 3},
    "gemma4_text": {
        "num_kv_shared_layers": 1,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 300,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "glm_moe_dsa": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "indexer_types": ["full", "full", "shared"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 48,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 16,
    },
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "youtu": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "phi": {"partial_rotary_factor": 0.5},
}


FLEXROUND = {"name": "flexround", "bits": 3, "group_size": 16, "init": "gptq"}


GPTQ = {"name": "gptq", "bits": 3, "group_size": 16}


def byte_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<u>", "<a>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(
    folder: Path, family: str = "llama", tied: bool = True, chat: bool = False, dtype=torch.float32, **changes: Any
) -> Path:
    """Save a random model whose blocks matter (large weights), and its tokenizer."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SHAPE, **EXTRA.get(family, {}), "tie_word_embeddings": tied, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "layers" in name else 0.5))
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer(chat).save_pretrained(folder)
    return folder


def save_with_images(folder, family):
    """Save a tiny random model with images, fp32, whose text part has the tiny shape."""
    usual = AutoConfig.for_model(family)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_heads": 2,
        "depth": 2,
        "image_size": 28,
        "patch_size": 14,
        "out_hidden_size": SHAPE["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    own = usual.vision_config.to_dict()
    text = {key: value for key, value in SHAPE.items() if key in usual.text_config.to_dict()}
    special = {key: 290 + i for i, key in enumerate(usual.to_dict()) if key.endswith(("_token_id", "_token_index"))}
    config = type(usual)(
        text_config=text | {"tie_word_embeddings": False},
        vision_config={key: value for key, value in vision.items() if key in own},
        tie_word_embeddings=False,
        **{key: min(value, 299) for key, value in special.items()},
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).float().save_pretrained(folder)
    byte_tokenizer(chat=False).save_pretrained(folder)
    return folder


KINDS = {"hybrid": "olmo_hybrid", "mixture": "qwen2_moe", "with images": "gemma3"}  # models unlike a plain decoder


def thorough_but(first: str, names: Iterable[str]) -> list[Any]:
    """Return the names as parameters of which all but the first are for `--thorough`."""
    return [name if name == first else pytest.param(name, marks=pytest.mark.thorough) for name in names]


def save_kinds(folder: Path) -> dict[str, Path]:
    """Save a tiny random model of each kind."""
    return {
        name: save_with_images(folder / family, family)
        if name == "with images"
        else save_tiny(folder / family, family, tied=False)
        for name, family in KINDS.items()
    }


def run(path, *arguments):
    main(["run", "--config", str(path), *arguments])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lfq: error: ")
    return message


def random_tensor(rows, columns, scheme, seed=0, dtype=torch.float16, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    groups = columns // scheme.group_of(columns)
    zero = torch.full((rows, groups, 1), scheme.middle_code).byte()
    if not scheme.symmetric:
        zero = torch.randint(1, 2**scheme.num_bits, (rows, groups, 1), generator=generator).byte()
    codes = torch.randint(0, 2**scheme.num_bits, (rows, columns), generator=generator).byte()
    scale = torch.randn(rows, groups, 1, generator=generator).to(dtype)
    return QuantizedTensor(codes.to(device), scale.to(device), zero.to(device), scheme)


class KilledError(Exception):
    pass


class KillAt(Callback):
    """Ends the run at the end of a batch, as far as files go as SIGKILL would."""

    def __init__(self, batch, by="exception"):
        self.left = batch
        self.by = by

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        if self.left == 0 and self.by == "exception":
            raise KilledError
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class KillAfterBlock(BlockCallback):
    def on_block_end(self, trainer, report):
        if report.index == 2:
            raise KilledError


class Count(BlockCallback):
    def __init__(self):
        self.batches = 0
        self.blocks = []

    def on_train_batch_end(self, *_):
        self.batches += 1

    def on_block_start(self, trainer, plan):
        self.blocks.append(plan.index)


def same_bytes(a: Path, b: Path) -> None:
    files = sorted(file.name for file in a.iterdir())
    assert files == sorted(file.name for file in b.iterdir())
    for name in files:
        if name not in {"metrics.json", "journal.jsonl"}:  # these hold times
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    before, after = (json.loads((folder / "metrics.json").read_text())["quantized"] for folder in (a, b))
    assert before == after
    names = ("index", "loss_before", "loss_after", "best_step", "kl_before", "kl_after", "fingerprint", "shards")
    journals = [[json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()] for folder in (a, b)]
    assert [[line[n] for n in names] for line in journals[0]] == [[line[n] for n in names] for line in journals[1]]


def shards(output):
    tensors = {}
    for file in sorted(output.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def quantizer(bits, group_size=32, symmetric=True):
    return {"name": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric}
