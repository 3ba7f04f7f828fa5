"""Tokens per second of a Llama-3 8B's shapes with random weights, batch 1: packed and in bf16, one way after another.

    python -m benchmarks.decode [--dry-run] [--seconds 180]

Ways: `eager`, transformers' `generate`; `static`, our decoder's step launched by Python; `graph`, the same step as a
CUDA graph; `compiled`, transformers' `generate` with a static cache, which it compiles with CUDA graphs itself. A row
has the share of what the bytes of a step allow at the copy bandwidth that the card shows. Rows go to
benchmarks/results/decode.csv as they come; one that is there, of this card and this code, is not made again.
Layers that read the same input are one product, as `load` has them, but for the model named `apart`.

`--dry-run` runs all ways but the graph on a CPU, on a small model, and writes no row.
"""

import argparse
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kernels.__main__ import copy_rate
from benchmarks.rows import ROOT, append, code_digest, finished
from lfq_lightning.errors import one_line
from lfq_lightning.grids import IntegerGrid
from lfq_lightning.packed.decode_speed import Clock
from lfq_lightning.packed.decoder import Decoder
from lfq_lightning.packed.merge_layers import merge_layers
from lfq_lightning.packed.packed_linear import PackedLinear
from lfq_lightning.packed.sampler import Sampler
from lfq_lightning.quantized_tensor import QuantizedTensor

RESULTS = ROOT / "benchmarks" / "results" / "decode.csv"
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = LLAMA_8B | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = ("W4g128", "bf16", "W3g128", "W4g128 apart", "W2g128")
GROUP = 128
PROMPT, NEW, LENGTH = 128, 128, 1024  # tokens; the length of a static cache
WAYS = ("graph", "static", "eager", "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="a small model on a CPU, no rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing later than that")
    given = parser.parse_args()
    if given.dry_run:
        for name in ("W4g128", "bf16", "W3g128 apart"):
            model = random_model(SMALL, name, "cpu")
            for way in WAYS[1:]:
                seconds = step_seconds(model, way, 8, 6)
                print(f"{name} {way}: {1 / seconds:.1f} tokens/s, {step_bytes(model, 8) / 1e6:.2f} MB a step")
        return
    if not torch.cuda.is_available():
        parser.exit(1, "benchmarks.decode needs a CUDA GPU; --dry-run goes without one.\n")
    begun, rate = time.monotonic(), copy_rate()
    for ways in (WAYS[:-1], WAYS[-1:]):  # what takes a minute to compile comes last
        for name in MODELS:
            model = None
            for way in ways:
                cell = {"device": torch.cuda.get_device_name(), "model": f"Llama-3 8B's shapes, {name}", "way": way}
                cell |= {"code": code_digest("packed", "ops/packed_matmul")}
                if finished(cell, RESULTS) or time.monotonic() - begun > given.seconds:
                    continue
                model = model or random_model(LLAMA_8B, name, "cuda")
                row = cell | measured(model, way, rate)
                append(RESULTS, row)
                print(*row.values(), flush=True)
            del model
            torch.cuda.empty_cache()


def measured(model: LlamaForCausalLM, way: str, rate: float) -> dict[str, str]:
    """Return the columns of a row; a way that fails says so."""
    seconds, note = math.nan, ""
    try:
        seconds = step_seconds(model, way, PROMPT, NEW)
    except Exception as error:  # that transformers cannot compile it, or we cannot capture it, is a result
        if "CUDA error" in str(error):  # nothing runs in this process any more
            raise
        note = f"{type(error).__name__}: {one_line(error)[:100]}"
    read = step_bytes(model, PROMPT + NEW // 2 if way == "eager" else LENGTH)
    row = {"tokens_per_second": f"{1 / seconds:.1f}", "microseconds": f"{seconds * 1e6:.0f}"}
    row |= {"gigabytes": f"{read / 1e9:.3f}", "share_of_copy": f"{read / seconds / rate:.3f}", "note": note}
    return row | {"versions": " ".join(f"{p}={importlib.metadata.version(p)}" for p in ("torch", "transformers"))}


def random_model(shape: dict[str, int], name: str, device: str) -> LlamaForCausalLM:
    """Return a Llama of random weights, made on the device; all but embeddings and head packed if there are bits."""
    bits = int(name[1]) if name.startswith("W") else None
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and bits is not None and path != "lm_head":
            model.set_submodule(path, PackedLinear(_random_weight(module, bits, device), None))
    if not name.endswith("apart"):
        merge_layers(model)
    rotary = type(model.model.rotary_emb)(config).to(device)
    model.model.rotary_emb = rotary
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            drawn = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device) * 0.02
            owner, _, own = path.rpartition(".")
            setattr(model.get_submodule(owner), own, nn.Parameter(drawn, requires_grad=False))
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    return model


def _random_weight(linear: nn.Linear, bits: int, device: str) -> QuantizedTensor:
    o, i = linear.weight.shape
    codes = torch.randint(0, 2**bits, (o, i), dtype=torch.uint8, device=device)
    scale = torch.full((o, i // GROUP, 1), 0.02 / 2**bits, dtype=torch.bfloat16, device=device)
    zero_point = torch.full_like(scale, 2 ** (bits - 1)).byte()
    return QuantizedTensor(codes, scale, zero_point, IntegerGrid(bits, GROUP))


def step_bytes(model: LlamaForCausalLM, tokens: int) -> int:
    """Return the bytes that a step reads: all weights but the embeddings, and the keys and values of `tokens`.

    A static cache is read to its end, however much of it is filled.
    """
    embeddings = model.get_input_embeddings().weight.nbytes
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    packed = [module for module in model.modules() if isinstance(module, PackedLinear) and hasattr(module, "int4")]
    on_cpu = sum(tensor.nbytes for module in packed for tensor in vars(module.int4).values() if torch.is_tensor(tensor))
    config = model.config
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    return sum(weights.values()) + on_cpu - embeddings + cache


def step_seconds(model: LlamaForCausalLM, way: str, prompt_tokens: int, new_tokens: int) -> float:
    """Return the median seconds of a token."""
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), device=model.device)
    answer = _ways(model, prompt, new_tokens)[way]()
    for _ in range(2):  # the first time everything is compiled
        ticks = list(answer())
    return statistics.median(after - before for before, after in pairwise(ticks[1:]))


def _ways(
    model: LlamaForCausalLM, prompt: Tensor, new_tokens: int
) -> dict[str, Callable[[], Callable[[], Iterator[float]]]]:
    """Return what makes each way; an answer yields the time of each token."""

    def by_generate(**settings: object) -> Callable[[], Iterator[float]]:
        def answer() -> Iterator[float]:
            clock = Clock()
            model.generate(
                prompt, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, streamer=clock, **settings
            )
            yield from clock.ticks[1:]

        return answer

    def by_decoder(graph: bool) -> Callable[[], Iterator[float]]:
        decoder = Decoder(model, max(LENGTH, prompt.shape[1] + new_tokens), graph, Sampler())

        def answer() -> Iterator[float]:
            for _ in decoder.answer(prompt, new_tokens, set()):
                yield time.perf_counter()

        return answer

    return {
        "graph": lambda: by_decoder(graph=True),
        "static": lambda: by_decoder(graph=False),
        "eager": by_generate,
        "compiled": lambda: by_generate(cache_implementation="static"),
    }


if __name__ == "__main__":
    main()
