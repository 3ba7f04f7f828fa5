"""What differs between model families: names of the parts. A new family is a row here; the contract tests cover it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lfq_lightning.models.tensor_names import TensorNames

# (module whose output can be divided by a vector, linear layers that read it), names inside a block
Folds = tuple[tuple[str, tuple[str, ...]], ...]

_WEIGHT = ".weight"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_INNER: Folds = (("self_attn.v_proj", ("self_attn.o_proj",)), ("mlp.up_proj", ("mlp.down_proj",)))
_ATTENTION: Folds = (("input_layernorm", _QKV), ("self_attn.v_proj", ("self_attn.o_proj",)))


@dataclass(frozen=True)
class Family:
    """Module paths inside the `…ForCausalLM` model of transformers, and names in its config.

    Args:
        folds: where a scaling of a layer's inputs can be folded, in the order of the forward (AWQ); None: to be found.
        unit_offset: its norms multiply by 1 + weight.
        logit_factor: key in the config of a factor on the logits.
        logit_divisor: key in the config of a divisor of the logits.
        softcap: key in the config of a bound on the logits.
        stored: (in the model, on disk): parts of names that differ there.
        names: transformers' own names on disk; None if they are those of the model but for `stored`.
        embeddings: the input embeddings.
        terms: factor on the logits and their bound where they were found, not named in the config.
    """

    decoder: str = "model"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    folds: Folds | None = (("input_layernorm", _QKV), ("post_attention_layernorm", _GATE_UP), *_INNER)
    unit_offset: bool = False
    logit_factor: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None
    stored: tuple[tuple[str, str], ...] = ()
    names: TensorNames | None = None
    embeddings: str = "model.embed_tokens"
    terms: tuple[float, float | None] | None = None

    def stored_name(self, name: str) -> str:
        """Return the name on disk of a tensor of the model."""
        for here, there in self.stored:
            name = name.replace(here, there)
        return self.names.stored_name(name) if self.names else name

    def model_name(self, name: str) -> str:
        """Return the name in the model of the tensor that has this name on disk."""
        for here, there in self.stored:
            name = name.replace(there, here)
        return self.names.model_name(name) if self.names else name

    def stored_layer(self, name: str) -> str:
        """Return the name on disk of a layer of the model."""
        return self.stored_name(name + _WEIGHT).removesuffix(_WEIGHT)

    def model_layer(self, name: str) -> str:
        """Return the name in the model of the layer that has this name on disk."""
        return self.model_name(name + _WEIGHT).removesuffix(_WEIGHT)

    def converted(self, name: str) -> bool:
        """Tell whether transformers merges or splits what becomes this tensor of the model."""
        return self.names is not None and self.names.converted(name)

    def is_extra(self, name: str) -> bool:
        """Tell whether a tensor is none of the model's, and ships as it is."""
        return self.names is not None and self.names.is_extra(name)

    def groups(self, stored: Iterable[str]) -> list[tuple[str, ...]]:
        """Return which tensors on disk become tensors of the model together."""
        return self.names.groups(stored) if self.names else [(name,) for name in stored]

    def to_model(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's tensors, by name, of those on disk, by name; whole groups."""
        if self.names:
            return self.names.to_model(tensors)
        return {self.model_name(name): tensor for name, tensor in tensors.items()}

    def to_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors on disk, by name, of those of the model, by name."""
        if self.names:
            return self.names.to_disk(tensors)
        return {self.stored_name(name): tensor for name, tensor in tensors.items()}

    def to_source(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors by the names that a full-precision checkpoint has for them."""
        return self.names.to_source(tensors) if self.names else self.to_disk(tensors)

    def ignored(self, layers: list[str]) -> list[str]:
        """Return how an `ignore` list calls layers: by the names on disk, which vLLM reads, and, where transformers
        renames them, by those in its model.
        """
        stored = [self.stored_layer(layer) for layer in layers]
        renamed = [layer for layer in layers if layer not in stored]
        return [*stored, *renamed] if self.names and self.names.renamed else stored

    def logit_terms(self, settings: dict[str, Any]) -> tuple[float, float | None]:
        """Return the factor on the logits and their bound, None without one, by a model's config."""
        if self.terms is not None:
            return self.terms
        scale = float(settings[self.logit_factor]) if self.logit_factor else 1.0
        scale /= float(settings[self.logit_divisor]) if self.logit_divisor else 1.0
        return scale, settings[self.softcap] if self.softcap else None


PLAIN = Family()
_GEMMA = Family(
    folds=(("input_layernorm", _QKV), ("pre_feedforward_layernorm", _GATE_UP), *_INNER),
    unit_offset=True,
    softcap="final_logit_softcapping",
)

FAMILIES: dict[str, Family] = {
    "cohere": Family(folds=(("input_layernorm", _QKV + _GATE_UP), *_INNER), logit_factor="logit_scale"),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": Family(logit_divisor="logits_scaling"),
    "llama": PLAIN,
    "mistral": PLAIN,
    "mixtral": Family(folds=_ATTENTION, stored=((".mlp.", ".block_sparse_moe."),)),
    "phi": Family(
        norm="model.final_layernorm",
        folds=(("input_layernorm", (*_QKV, "mlp.fc1")), ("self_attn.v_proj", ("self_attn.dense",))),
    ),
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "qwen3_moe": Family(folds=_ATTENTION),
}
