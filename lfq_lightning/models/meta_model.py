"""Build a model without weights, and give it weights without copying them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from lfq_lightning.errors import UserError, named, said
from lfq_lightning.models.experts import split_experts
from lfq_lightning.models.kept_linear import keep_linears
from lfq_lightning.models.tensor_names import TensorNames


def empty_model(config: PretrainedConfig, source: object) -> PreTrainedModel:
    """Return the model as transformers builds it, all of it on the meta device, frozen and in eval mode.

    Raises UserError, naming `source`, for values that make no model.
    """
    refusal = f"{source}: the values of config.json make no model"
    with torch.device("meta"), said(lambda error: f"{refusal} ({named(error)}); mend it."):
        return _class(config).from_config(config).eval().requires_grad_(False)


def parted_model(config: PretrainedConfig, source: object) -> tuple[PreTrainedModel, TensorNames]:
    """Return the empty model with its parts as they are quantised, and the names of its tensors on disk.

    Experts of a mixture are linear layers of their own, as in checkpoints, not one tensor for all; what cannot be
    packed is no linear layer. Raises UserError.
    """
    model = empty_model(config, source)
    split_experts(model)
    with said(lambda error: f"{source}: transformers cannot write the names of its tensors ({named(error)})."):
        names = TensorNames(model)
    keep_linears(model, names)
    return model, names


def _class(config: PretrainedConfig) -> Any:
    """Return the Auto class that builds what the config names: a model with images if it does."""
    with_images: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    named = with_images is not None and with_images.__name__ in (config.architectures or ())
    text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not named
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def meta_model(config: PretrainedConfig, source: object) -> PreTrainedModel:
    """Return the model on the meta device, frozen and in eval mode; the tables no checkpoint stores are real.

    Its parts are as they are quantised. Raises UserError, naming `source`, for values that make no model.
    """
    model, _ = parted_model(config, source)
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            nearest = max((owner for owner in owners if not owner or f"{name}.".startswith(f"{owner}.")), key=len)
            owners[nearest]._init_weights(module)  # rotary frequencies, embedding scales: by its part's own config
    for owner in owners.values():
        owner._init_weights(owner)  # tables that a model gives to its layers
    return model


def check_shapes(module: nn.Module, tensors: dict[str, Tensor], source: object) -> None:
    """Raise UserError if a tensor is unknown to the module or has another shape than the config gives it."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name, tensor in tensors.items():
        if name not in expected:
            raise UserError(f"{source} holds a tensor {name} that its config knows nothing of; the two do not match.")
        if tuple(tensor.shape) != expected[name]:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, but its config says {expected[name]}; "
                "the two do not match."
            )


def assign_weights(model: PreTrainedModel, tensors: dict[str, Tensor], source: object) -> None:
    """Put `tensors` in place, as they are, and tie what the config ties.

    Raises UserError naming `source` if a weight is absent.
    """
    check_shapes(model, tensors, source)
    state = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    still_meta = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    absent = sorted(still_meta & set(state.missing_keys))
    if absent:
        raise UserError(f"{source} has no tensor {absent[0]}; fetch the model again.")
    model.requires_grad_(False)
