"""What differs between model families: names of the parts. A new family is a row here; the contract tests cover it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Module paths inside the `…ForCausalLM` model of transformers."""

    decoder: str = "model"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"


FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}
