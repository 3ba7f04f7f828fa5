"""Packed models against dense ones on this machine: decode, prefill, memory, and the speed of packing and exporting.

    python -m benchmarks.packed_inference --work runs/packed [--smollm2 MODEL.gguf]

A random Llama (D = 2048, 22 blocks, 32000 words: TinyLlama's shape) and SmolLM2, W4g64 rounded to nearest, batch 1;
each side in a process of its own, alternating; medians of ROUNDS. Dense is bf16, or fp32 where the CPU multiplies
faster so. Rows go to benchmarks/results/packed_inference.csv, in place of those of the same CPU.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.cpu import cpu
from lfq_lightning.cli import main as lfq
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.ops.bitstream import pack, unpack
from lfq_lightning.ops.packed_matmul import cpu_int4
from lfq_lightning.packed.decode_speed import compare
from lfq_lightning.precision import product_dtype
from lfq_lightning.quantized_tensor import QuantizedTensor

RESULTS = Path(__file__).parent / "results" / "packed_inference.csv"
ROUNDS, PROMPT, NEW = 3, 128, 48
LAYER = (4096, 14336)
EXPORT = """
import resource, sys
from lfq_lightning.packed.export import export
base = resource.getrusage(0).ru_maxrss
export(*sys.argv[1:4])
print(base, resource.getrusage(0).ru_maxrss)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--smollm2", help="SmolLM2-135M-Instruct as GGUF")
    given = parser.parse_args()
    checkpoints = {"llama-2048": _random_llama(given.work / "llama-2048")}
    if given.smollm2:
        checkpoints["smollm2"] = given.smollm2
    rows = []
    for name, checkpoint in checkpoints.items():
        run = _quantised(checkpoint, given.work / f"{name}-w4g64")
        found = [compare(str(run), PROMPT, NEW) for _ in range(ROUNDS)]
        for key in ("prefill", "decode", "model_bytes", "peak_bytes"):
            values = {side: [getattr(each[side], key) for each in found] for side in ("packed", "dense")}
            ours, theirs = (statistics.median(value) for value in values.values())
            rows.append({"what": f"{name} {key}", "packed": ours, "dense": theirs, "ratio": ours / theirs})
        rows += _export(run, given.work / f"{name}-gptq")
    rows += _products()
    rows += _packing()
    here = cpu()
    with RESULTS.open(newline="") as file:
        others = [row for row in csv.DictReader(file) if row["cpu"] != here]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["cpu", "what", "packed", "dense", "ratio"])
        writer.writeheader()
        writer.writerows([*others, *({"cpu": here} | row for row in rows)])
    for row in rows:
        print(*row.values())


def _random_llama(folder: Path) -> str:
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
        config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=4)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        words = {f"w{i}": i for i in range(config.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    return str(folder)


def _quantised(checkpoint: str, run: Path) -> Path:
    if not (run / "config.json").exists():
        text = run.with_suffix(".txt")
        text.write_text("<|endoftext|>".join(" ".join(f"w{i * j % 997}" for i in range(200)) for j in range(1, 5)))
        config = {
            "seed_everything": 1,
            "model": {"checkpoint": checkpoint},
            "data": {"dataset": str(text), "num_samples": 2, "num_held_out": 1, "seq_len": 64},
            "plan": [{"match": "all", "quantizer": {"name": "rtn", "bits": 4, "group_size": 64}}],
            "output": str(run),
        }
        file = run.with_suffix(".json")
        file.write_text(json.dumps(config))
        lfq(["run", "--config", str(file), "--overwrite", "true"])
    return run


def _export(run: Path, target: Path) -> list[dict[str, object]]:
    """Measure an export in one thread: MB/s of fp16 weights, and how far its peak memory is above the libraries'."""
    subprocess.run(["rm", "-rf", str(target)], check=True)
    from lfq_lightning.packed.packed_folder import PackedFolder

    folder = PackedFolder(run)
    half_bytes = 2 * sum(folder.shapes[name][0] * folder.shapes[name][1] for name in folder.schemes)
    started = time.perf_counter()
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads(1); {EXPORT}", run, "gptq", target]
    base, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    seconds = time.perf_counter() - started
    largest = max(file.stat().st_size for file in run.glob("*.safetensors"))
    extra = (peak - base) * 1024
    return [
        {"what": f"{target.name} export, MB/s of fp16 (process start included)", "packed": half_bytes / 1e6 / seconds},
        {"what": f"{target.name} export, peak above imports less largest shard, MB", "packed": (extra - largest) / 1e6},
    ]


def _products() -> list[dict[str, object]]:
    """Measure one product of M rows by the int4 kernel and by dequantising, in ms, and as a ratio to dense."""
    o, i = 5632, 2048
    scheme = IntegerGrid(4, 64)
    codes = torch.randint(0, 16, (o, i), dtype=torch.uint8)
    middle = torch.full((o, i // 64, 1), scheme.middle_code, dtype=torch.uint8)
    quantized = QuantizedTensor(codes, torch.rand(o, i // 64, 1).bfloat16() + 0.5, middle, scheme)
    dtype = product_dtype(torch.bfloat16, torch.device("cpu"))
    weight, dense = cpu_int4.Int4Weight(quantized), quantized.dequantize().to(dtype)
    rows: list[dict[str, object]] = []
    for m in (1, 4, 16, 64, 96, 128, 256, 512):
        x = torch.randn(m, i).to(dtype)
        theirs = _median(partial(F.linear, x, dense))
        for way, kernel_rows in (("int4 kernel", m), ("dequantised", 0)):
            cpu_int4.KERNEL_ROWS = cpu_int4.KERNEL_ROWS_IN_FP32 = kernel_rows
            ours = _median(partial(weight, x))
            what = f"{way}, ({m}, {i}) x ({o}, {i}), ms"
            rows.append({"what": what, "packed": ours, "dense": theirs, "ratio": ours / theirs})
    return rows


def _median(run: Callable[[], object], times: int = 9) -> float:
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def _packing() -> list[dict[str, object]]:
    """Measure the packer alone in one thread, MB/s of the fp16 weight."""
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, LAYER, dtype=torch.uint8)
        words = pack(codes, bits)
        for name, run in (("pack", partial(pack, codes, bits)), ("unpack", partial(unpack, words, bits, LAYER[1]))):
            rate = 2 * codes.numel() / 1e3 / _median(run, times=5)
            rows.append({"what": f"{name} {bits} bits, 4096x14336, MB/s of fp16", "packed": rate})
    return rows


if __name__ == "__main__":
    main()
