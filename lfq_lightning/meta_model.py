"""Build a model without weights, and give it weights without copying them."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lfq_lightning.errors import UserError


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device, frozen and in eval mode; the tables no checkpoint stores are real."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)  # rotary frequencies, embedding scales
    return model


def assign_weights(model: PreTrainedModel, tensors: dict[str, Tensor], source: object) -> None:
    """Put `tensors` in place, as they are, and tie what the config ties.

    Raises UserError naming `source` if a weight is absent.
    """
    state = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    still_meta = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    absent = sorted(still_meta & set(state.missing_keys))
    if absent or state.unexpected_keys:
        what = f"no tensor {absent[0]}" if absent else f"an unknown tensor {state.unexpected_keys[0]}"
        raise UserError(f"{source} has {what}; fetch the model again.")
    model.requires_grad_(False)
