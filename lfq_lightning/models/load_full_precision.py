"""Load the whole model of a checkpoint, in full precision."""

import torch
from transformers import PreTrainedModel

from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.meta_model import assign_weights, meta_model
from lfq_lightning.models.widen import widen


def load_full_precision(checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    """Return the whole model of a checkpoint, in the dtype it is stored in, or in fp32 where that is faster."""
    model = meta_model(checkpoint.config, checkpoint.path)
    assign_weights(model, checkpoint.tensors(checkpoint.names()), checkpoint.path)
    model.to(device=device)  # type: ignore[call-arg]
    widen(model)
    return model
