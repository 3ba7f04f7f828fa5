"""Build a model without weights, and give it weights without copying them."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lfq_lightning.errors import UserError, named, said
from lfq_lightning.models.experts import split_experts


def empty_model(config: PretrainedConfig, source: object) -> PreTrainedModel:
    """Return the model as transformers builds it, all of it on the meta device, frozen and in eval mode.

    Raises UserError, naming `source`, for values that make no model.
    """
    refusal = f"{source}: the values of config.json make no model"
    with torch.device("meta"), said(lambda error: f"{refusal} ({named(error)}); mend it."):
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def meta_model(config: PretrainedConfig, source: object) -> PreTrainedModel:
    """Return the model on the meta device, frozen and in eval mode; the tables no checkpoint stores are real.

    Experts of a mixture are linear layers of their own, as in checkpoints, not one tensor for all.

    Raises UserError, naming `source`, for values that make no model.
    """
    model = empty_model(config, source)
    with torch.device("meta"):
        split_experts(model)
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)  # rotary frequencies, embedding scales
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
