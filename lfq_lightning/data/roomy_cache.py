"""A cache of keys and values with room to grow: a new token is written into it, not appended to a copy of it."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lfq_lightning.models.cache_argument import cache_argument

_ROOM = 64  # tokens by which a layer grows at once


class _RoomyLayer(DynamicLayer):
    """transformers' DynamicLayer, whose keys and values are the filled part of larger tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, D) of the next T tokens; return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._whole = [key_states[:, :, :0], value_states[:, :, :0]]
            self._used = 0
        first, self._used = self._used, self._used + key_states.shape[2]
        if self._used > self._whole[0].shape[2]:
            self._whole = [self._larger(old, first) for old in self._whole]
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, first : self._used] = new
        self.keys, self.values = (whole[:, :, : self._used] for whole in self._whole)
        return self.keys, self.values

    def _larger(self, old: Tensor, filled: int) -> Tensor:
        batch, heads, _, width = old.shape
        larger = old.new_empty(batch, heads, self._used + _ROOM, width)
        larger[:, :, :filled] = old[:, :, :filled]
        return larger


def roomy_cache(model: PreTrainedModel) -> dict[str, DynamicCache]:
    """Return an empty cache for one call of `generate` by the name of its argument.

    Layers that keep all tokens have room to grow.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {cache_argument(model): cache}
