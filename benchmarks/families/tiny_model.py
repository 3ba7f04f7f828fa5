"""Tiny random models of any type: the config's own values, with sizes made small by what their keys say."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.helpers import byte_tokenizer

VOCABULARY = 512
LAYERS = 3
_LARGEST = 3 * 10**7  # parameters
_WIDTH, _HEADS, _HEAD = 64, 4, 16

# the first that fits a key gives its value; sizes of the text part
_SIZES: list[tuple[str, Any]] = [
    (r"vocab_size", VOCABULARY),
    (r"^(hidden_size|d_model|n_embd|word_embed_proj_dim|lru_width)$", _WIDTH),
    (r"hidden_size_per_layer_input|lora_rank|laurel_rank|dt_rank|time_step_rank|lowrank|norm_rank|dim_model_base", 32),
    (r"(moe|expert).*intermediate|expert_ffn|^shared_intermediate", 64),
    (r"intermediate_size|ffn_(dim|hidden)|n_inner|d_ff", 128),
    (r"(key_value|kv|key)_heads$|multi_query_group", 2),
    (r"linear_num_value_heads|^(num_attention|swa_num_attention|num|n)_heads?$|index_n_heads|^n_head$", _HEADS),
    (r"mamba.*heads", 8),
    (r"mamba_d_ssm", 128),
    (r"head_dim$|d_head$|kv_channels|(state_size|d_state)$|chunk_size|^d_rel$", _HEAD),
    (r"(experts_per_tok|per_token|_topk|top_k_experts|moe_k|top_k)$", 2),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"shared_experts$|^n_group$|^topk_group$|^n_groups$|num_expert_group|first_k_dense|num_dense_layers", 1),
    (r"nextn_predict", 0),
    (r"^(num_hidden_layers|n_layers?|num_layers)$", LAYERS),
    (r"max_position|n_positions|n_ctx|max_seq_len|model_max_length", 512),
    (r"window|index_topk", _HEAD),
    (r"initializer_(range|std)|init_std", 0.08),
    (r"^pad_token_id$", 0),
    (r"^bos_token_id$", 1),
    (r"^(eos|eod|sep)_token_id$", 2),
    (r"dropout|_pdrop", 0.0),
]
_IMAGE_SIZES: list[tuple[str, Any]] = [
    (r"^(hidden_size|embed_dim|projection_dim)$", 32),
    (r"intermediate_size", 64),
    (r"num_hidden_layers|^depth$|num_layers|num_attention_heads|num_heads|attention_heads", 2),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"out_hidden_size|vision_output_dim", _WIDTH),
    (r"position_embeddings", 16),
    (r"fullatt_block_indexes", [1]),
    (r"deepstack_visual_indexes", [0]),
    (r"num_global_layers", 1),
]
_PATTERN = re.compile(r"^(layer_types|mlp_layer_types|indexer_types)$")
_MARK = re.compile(r"(image|video|vision|boi|eoi|audio|media).*(token_id|token_index|_index)$")


def model_types() -> list[str]:
    """Return the types of all decoders, with and without images, that transformers knows."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def auto_class(model_type: str) -> Any:
    """Return the Auto class that opens a model of this type."""
    text = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in _also_with_images()
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def save_tiny_model(model_type: str, folder: Path) -> None:
    """Write a random model of this type and a tokenizer of bytes. Raises what transformers does if none can be made."""
    config = _tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class(model_type).from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"its config still has {size:,} parameters")
    torch.manual_seed(0)
    model = auto_class(model_type).from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 35)[None]).logits
    if not logits.isfinite().all():
        raise ValueError("its own logits are not finite")
    model.save_pretrained(folder)
    byte_tokenizer(chat=False).save_pretrained(folder)


def _also_with_images() -> set[str]:
    """Return the types that stand in both tables: their class with images is the one that checkpoints name."""
    return {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} & {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}


def _tiny_config(model_type: str) -> PretrainedConfig:
    usual = CONFIG_MAPPING[model_type]()
    values = _shrunk(usual, _SIZES)
    for key in ("text_config", "llm_config", "vision_config", "audio_config"):
        if isinstance(part := getattr(usual, key, None), PretrainedConfig):
            values[key] = _shrunk(part, _SIZES if key in ("text_config", "llm_config") else _IMAGE_SIZES)
            values[key]["model_type"] = part.model_type
    for number, key in enumerate(sorted(usual.to_dict())):
        if _MARK.search(key) and isinstance(getattr(usual, key), int):
            values[key] = VOCABULARY - 20 + number % 16
    return AutoConfig.for_model(model_type, **values)


def _shrunk(config: PretrainedConfig, sizes: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return small values for the keys of a config that have some; what a family has switched off stays off."""
    values: dict[str, Any] = {}
    for key, usual in config.to_dict().items():
        small = next((value for pattern, value in sizes if re.search(pattern, key)), None)
        if _PATTERN.search(key) and isinstance(usual, list):
            values[key] = _each_kind(usual)
        elif small is not None and usual is not None and not isinstance(usual, bool | str | dict):
            values[key] = small
    return values


def _each_kind(layers: list[str]) -> list[str]:
    """Return each kind of layer once, full attention last, which some configs ask for; at least as many as layers."""
    kinds = list(dict.fromkeys(layers))
    return sorted(kinds + [kinds[-1]] * (LAYERS - len(kinds)), key=lambda kind: kind.startswith("full"))[-LAYERS:]
