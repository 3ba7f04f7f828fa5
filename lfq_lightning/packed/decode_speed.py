"""How fast a packed model reads and writes, against the same model dense."""

import multiprocessing
import statistics
import time
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from lfq_lightning.ops.path import best_device
from lfq_lightning.packed.generate import Writer
from lfq_lightning.packed.load_model import load
from lfq_lightning.peak_memory import peak_bytes


class Clock(BaseStreamer):
    """Notes when the writer hands on the prompt and then each token."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class DecodeSpeed:
    """Tokens per second of one model, batch 1, and what it holds in memory.

    Args:
        prefill: tokens of a prompt per second.
        decode: new tokens per second, the median.
        model_bytes: of its parameters and buffers.
        peak_bytes: on a CPU resident in the process that did nothing else, the libraries included; on a GPU allocated.
        dtype: of what is not packed: bf16, or what is fastest on this CPU.
    """

    prefill: float
    decode: float
    model_bytes: int
    peak_bytes: int
    dtype: str


def measure(folder: str, packed: bool, prompt_tokens: int, new_tokens: int) -> DecodeSpeed:
    """Measure one side in this process; the dense side has the weights that ship."""
    device = best_device()
    model, _ = load(folder, dequantize=not packed, device=device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator).to(device)
    clock = Clock()
    writer = Writer(model)
    long = device.type == "cuda"  # there kernels are compiled first, and a graph of that length is captured
    writer.write(prompt if long else prompt[:, :8], new_tokens + 1 if long else 2, set(), None)
    writer.write(prompt, new_tokens + 1, set(), clock)
    begun, first, *rest = clock.ticks
    steps = [after - before for before, after in pairwise([first, *rest])]
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    decode = 1 / statistics.median(steps)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return DecodeSpeed(prompt_tokens / (first - begun), decode, sum(tensors.values()), peak_bytes(device), dtype)


def compare(folder: str, prompt_tokens: int, new_tokens: int) -> dict[str, DecodeSpeed]:
    """Measure the packed model and its dense twin, each in a process of its own, one after the other."""
    found = {}
    for name, packed in (("packed", True), ("dense", False)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(measure, (folder, packed, prompt_tokens, new_tokens))
    return found


def bench(folder: str, prompt_tokens: int, new_tokens: int) -> None:
    """Print both sides and their ratios."""
    found = compare(folder, prompt_tokens, new_tokens)
    table = Table(
        title=f"{folder}: {prompt_tokens} prompt tokens, {new_tokens} new ones, batch 1", title_justify="left"
    )
    for column in ("", "prefill, tokens/s", "decode, tokens/s", "model in memory, MB", "peak, MB"):
        table.add_column(column)
    for name, speed in found.items():
        row = (speed.prefill, speed.decode, speed.model_bytes / 1e6, speed.peak_bytes / 1e6)
        table.add_row(f"{name}, {speed.dtype}", *(f"{value:.1f}" for value in row))
    ours, theirs = found.values()
    ratios = [a / b for a, b in zip(astuple(ours)[:4], astuple(theirs)[:4], strict=True)]
    table.add_row("ratio", *(f"{ratio:.2f}x" for ratio in ratios))
    Console(markup=False).print(table)
