"""Decoder: tokens one after another, keys and values in one place; on a GPU each step is one CUDA graph.

An eager step launches some 46 kernels a layer, each from Python and tens of microseconds after the last, which is more
than a packed product takes. A graph launches them all at once: the token, its position and the cache stay where they
are, so nothing has to come from the host.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer

from lfq_lightning.models.cache_argument import cache_argument
from lfq_lightning.models.experts import ExpertList
from lfq_lightning.packed.sampler import Sampler

# settings of a generation config that change answers, whoever chooses the tokens, but for these values
_NEUTRAL = {"repetition_penalty": 1, "encoder_repetition_penalty": 1, "num_beams": 1, "guidance_scale": 1}
_CHANGE = {"no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"}
_CHANGE |= {"forced_eos_token_id", "exponential_decay_length_penalty", "min_length", "min_new_tokens", "sequence_bias"}
_CHANGE |= {"watermarking_config", "stop_strings", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens"}
_HOST_ROPES = {"dynamic", "longrope"}  # whose tables depend on the length, which the host asks for
_WARM_UP = 3  # steps before the capture: kernels are compiled and workspaces allocated


class Decoder:
    """Decoding of one sequence.

    Args:
        model: one that `decodable` takes, on the device where it runs.
        length: tokens of a prompt and its answer at most.
        graph: capture the step as a CUDA graph.
        sampler: which chooses each token.
    """

    def __init__(self, model: PreTrainedModel, length: int, graph: bool, sampler: Sampler) -> None:
        assert length > _WARM_UP
        self.model, self.length, self.sampler = model, length, sampler
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._named: dict[str, Any] = {cache_argument(model): self._cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._named["logits_to_keep"] = 1  # of a long prompt they would be gigabytes
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._graph = self._captured() if graph else None

    @torch.no_grad()
    def answer(self, prompt: Tensor, max_new_tokens: int, ends: set[int]) -> Iterator[int]:
        """Yield the tokens of an answer as they come, one of `ends` included.

        Args:
            prompt: int64 (1, T), on the model's device; T + max_new_tokens must not exceed `length`.
        """
        assert prompt.shape[1] + max_new_tokens <= self.length
        self._cache.reset()
        with self._on_device():
            self._next(prompt)
        coming = self._sent()
        for number in range(max_new_tokens):
            token = coming
            if number + 1 < max_new_tokens:  # the next step is queued before this one's token is waited for
                self.step()
                coming = self._sent()
            yield (found := token())
            if found in ends:
                return

    def step(self) -> None:
        """Put the token that follows in place of the last one, and the last one's keys and values into the cache."""
        with self._on_device():
            if self._graph is None:
                self._next(self._token)
            else:
                self._graph.replay()

    def _next(self, ids: Tensor) -> None:
        logits = self.model(input_ids=ids, **self._named).logits[:, -1]
        self._token.copy_(self.sampler(logits))

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make the model's GPU the current one, whose stream graphs and events are on."""
        device = self._token.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    @torch.no_grad()
    def _captured(self) -> torch.cuda.CUDAGraph:
        with self._on_device():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._next(self._token)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._next(self._token)
        return graph

    def _sent(self) -> Callable[[], int]:
        """Send the last token to the host; return what waits for it."""
        if self._token.device.type != "cuda":
            value = int(self._token)
            return lambda: value
        with self._on_device():
            host = torch.empty(1, 1, dtype=torch.int64, pin_memory=True)
            host.copy_(self._token, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def wait() -> int:
            arrived.synchronize()
            return int(host)

        return wait


def decodable(model: PreTrainedModel) -> bool:
    """Return whether a Decoder gives this model's answers, and no known reason keeps its step from a graph.

    Not so: windows and recurrent states, whose position the host counts; experts, of which the host calls those that
    were chosen; rotary tables that follow the length; a generation config that changes logits.
    """
    generation = model.generation_config
    settings = {} if generation is None else generation.to_dict()
    changed = any(settings.get(name) not in (None, 0, _NEUTRAL.get(name)) for name in _CHANGE | _NEUTRAL.keys())
    ropes = set(re.findall(r"'rope_type': '(\w+)'", str(model.config.to_dict())))
    if not model._can_compile_fullgraph or changed or ropes & _HOST_ROPES:
        return False
    layers = StaticCache(config=model.config, max_cache_len=1).layers
    return all(type(layer) is StaticLayer for layer in layers) and not any(
        isinstance(module, ExpertList) for module in model.modules()
    )
