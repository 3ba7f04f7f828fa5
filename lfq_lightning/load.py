"""Load a packed model as a transformers model with the weights that ship."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lfq_lightning.errors import UserError
from lfq_lightning.meta_model import assign_weights, meta_model
from lfq_lightning.pack_format import dequantized, schemes_of


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a finished run, its weights dequantised to the dtype that ships, and its tokenizer.

    Raises UserError if the folder is not a finished run, or its files are damaged.
    """
    path = Path(folder).expanduser()
    index = path / "model.safetensors.index.json"
    if not (path / "config.json").is_file() or not index.is_file():
        raise UserError(
            f"{path} is not a finished packed model (no config.json with its index); run `lfq run` to make one."
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        quantization = json.loads((path / "config.json").read_text()).get("quantization_config")
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: config or index is damaged ({str(error)[:100]}); copy the model again.") from error
    if quantization is None or quantization.get("format") != "pack-quantized":
        raise UserError(f"{path} is not in the format pack-quantized; load it with transformers.")
    del config.quantization_config
    stored: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(path / file, "pt") as shard:
                stored |= {name: shard.get_tensor(name) for name in shard.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path / file} cannot be read ({error}); copy the model again.") from error
    layers = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    try:
        weights = dequantized(stored, schemes_of(quantization, layers))
    except KeyError as error:
        raise UserError(f"{path}: the shards hold no {error}; copy the model again.") from error
    model = meta_model(config)
    assign_weights(model, weights, path)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


def generate(folder: str | Path, prompt: str, max_new_tokens: int) -> str:
    """Return the model's greedy answer to `prompt`, put through its chat template if it has one."""
    model, tokenizer = load(folder)
    text = prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)  # type: ignore[operator]
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
