"""The name by which a model's forward takes its cache: transformers has changed it."""

import inspect

from transformers import PreTrainedModel


def cache_argument(model: PreTrainedModel) -> str:
    """Return `cache`, or `past_key_values` before transformers 5.20."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
