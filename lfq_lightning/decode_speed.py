"""How fast a packed model reads and writes, against the same model in bf16: `lfq bench`."""

import multiprocessing
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from lfq_lightning.load_model import load
from lfq_lightning.peak_memory import peak_bytes

_WARM_UP = 2  # tokens


@dataclass(frozen=True)
class DecodeSpeed:
    """Tokens per second of one model, batch 1, and what it holds in memory.

    Args:
        prefill: tokens of a prompt per second.
        decode: new tokens per second, the median.
        model_bytes: of its parameters and buffers.
        peak_bytes: resident in the process that did nothing else, the libraries included.
    """

    prefill: float
    decode: float
    model_bytes: int
    peak_bytes: int


def measure(folder: str, packed: bool, prompt_tokens: int, new_tokens: int) -> DecodeSpeed:
    """Measure one side in this process; the bf16 side has the weights that ship, dense."""
    model, _ = load(folder, dequantize=not packed)
    if not packed:
        model.bfloat16()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator)
    seconds = []
    with torch.no_grad():
        model(prompt[:, :8], use_cache=True)
        started = time.perf_counter()
        output = model(prompt, use_cache=True, logits_to_keep=1)
        prefill = prompt_tokens / (time.perf_counter() - started)
        for _ in range(new_tokens + _WARM_UP):
            started = time.perf_counter()
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - started)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    decode = 1 / statistics.median(seconds[_WARM_UP:])
    return DecodeSpeed(prefill, decode, sum(tensors.values()), peak_bytes(torch.device("cpu")))


def compare(folder: str, prompt_tokens: int, new_tokens: int) -> dict[str, DecodeSpeed]:
    """Measure the packed model and its bf16 twin, each in a process of its own, one after the other."""
    found = {}
    for name, packed in (("packed", True), ("bf16", False)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(measure, (folder, packed, prompt_tokens, new_tokens))
    return found


def bench(folder: str, prompt_tokens: int, new_tokens: int) -> None:
    """Print both sides and their ratios."""
    found = compare(folder, prompt_tokens, new_tokens)
    table = Table(
        title=f"{folder}: {prompt_tokens} prompt tokens, {new_tokens} new ones, batch 1", title_justify="left"
    )
    for column in ("", "prefill, tokens/s", "decode, tokens/s", "model in memory, MB", "peak resident, MB"):
        table.add_column(column)
    for name, speed in found.items():
        row = (speed.prefill, speed.decode, speed.model_bytes / 1e6, speed.peak_bytes / 1e6)
        table.add_row(name, *(f"{value:.1f}" for value in row))
    ours, theirs = found.values()
    ratios = [getattr(ours, key) / getattr(theirs, key) for key in vars(ours)]
    table.add_row("ratio", *(f"{ratio:.2f}x" for ratio in ratios))
    Console().print(table)
