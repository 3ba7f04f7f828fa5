"""Work through a list in batches that fit the memory, with a line of progress and an ETA."""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from lfq_lightning.clock import clock

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_CPU_TOKENS = 4096  # of a batch: enough for matrix products to be large
_LARGEST = 256
_SHARE = 0.6  # of a GPU's free memory for keys and values; the rest is for logits and what is being computed
_SAY_EVERY = 20.0  # seconds


def batch_size(config: PretrainedConfig, tokens: int, device: torch.device) -> int:
    """Return how many sequences of `tokens` tokens to run at once: on a GPU by their keys and values."""
    if device.type != "cuda":
        return max(1, min(_LARGEST, _CPU_TOKENS // tokens))
    sizes = config.get_text_config().to_dict()
    heads = sizes.get("num_key_value_heads") or sizes["num_attention_heads"]
    width = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    each = 2 * 2 * sizes["num_hidden_layers"] * heads * width * tokens + 4 * sizes["vocab_size"]
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(_LARGEST, int(_SHARE * free) // each))


def in_batches(
    what: str, items: list[Item], size: int, run: Callable[[list[Item]], Result]
) -> Iterator[tuple[list[Item], Result]]:
    """Yield (batch, run(batch)) for batches of `size` items in order; where a GPU's memory runs out, halve them.

    Args:
        what: the work, for the log.
    """
    started = said = time.perf_counter()
    done = 0
    while done < len(items):
        batch = items[done : done + size]
        try:
            result = run(batch)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            log.info("%s: out of memory, going on in batches of %d", what, size)
            gc.collect()
            torch.cuda.empty_cache()
            continue
        done += len(batch)
        yield batch, result
        now = time.perf_counter()
        if now - said > _SAY_EVERY or done == len(items):
            said, spent = now, now - started
            eta = spent * (len(items) - done) / done
            log.info("%s: %d/%d, %s, eta %s", what, done, len(items), clock(spent), clock(eta))
