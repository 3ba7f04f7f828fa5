"""How memory and time grow with a model, on a CPU.

    python -m benchmarks.scale blocks --work runs/scale      # 8 … 64 blocks: peak memory, seconds
    python -m benchmarks.scale 70b --work runs/scale         # the last block and the head of Llama-3.1-70B's sizes

Random weights: only sizes matter. Writes benchmarks/results/scale_blocks.csv and scale_70b.csv.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.random_llama import save_random_llama, save_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCKS = (8, 16, 32, 64)
HIDDEN, INTERMEDIATE = 512, 1408
WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
VOCABULARY = 128256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("blocks", "70b"))
    parser.add_argument("--work", type=Path, required=True, help="a folder for what lies between")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    (given.work / "text.txt").write_text((ROOT / "LICENSE").read_text() * 3)
    blocks(given.work) if given.what == "blocks" else wide(given.work)


def blocks(work: Path) -> None:
    """Quantise random Llamas of more and more blocks."""
    rows = []
    for number in BLOCKS:
        model = work / f"llama-{number}"
        save_random_llama(model, number, HIDDEN, INTERMEDIATE)
        flexround = {"name": "flexround", "bits": 4, "group_size": 64}
        training = {"steps": 4, "batch_size": 4}
        plan = [
            {"match": "last", "quantizer": flexround, "objective": "logit_ce", **training},
            {"match": "all", "quantizer": flexround, **training},
        ]
        data = {"dataset": str(work / "text.txt"), "num_samples": 16, "seq_len": 256, "num_held_out": 4}
        seconds, peak = run(work, f"blocks-{number}", model, plan, data)
        rows.append({"blocks": number, "peak_bytes": peak, "seconds": f"{seconds:.2f}"})
        print(rows[-1], flush=True)
        shutil.rmtree(model)
    block_bytes = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)  # as stored, bf16
    memory = linear_regression(BLOCKS, [row["peak_bytes"] for row in rows])
    print(f"{memory.slope / 1e3:.0f} kB a block, {100 * memory.slope / block_bytes:.2f} % of its bytes")
    seconds = [float(row["seconds"]) for row in rows]
    print(f"time: {linear_regression(BLOCKS, seconds).slope:.2f} s a block, R² {_r_squared(BLOCKS, seconds):.5f}")
    _write("scale_blocks.csv", rows)


def wide(work: Path) -> None:
    """Calibrate one block and the head of Llama-3.1-70B's sizes through the final module, on short sequences."""
    model = work / "llama-70b-1"
    save_wide(model, WIDE, blocks=1)
    flexround = {"name": "flexround", "bits": 4, "group_size": 128, "rank": 1024}  # LRQ, for the memory
    training = {"steps": 3, "batch_size": 2, "optimizer": "adamw8bit", "activation_checkpointing": True}
    plan = [{"match": "last", "quantizer": flexround, "objective": "logit_ce", **training}]
    data = {"dataset": str(work / "text.txt"), "num_samples": 4, "seq_len": 128, "num_held_out": 2}
    seconds, peak = run(work, "70b", model, plan, data, precision="bf16-mixed")
    journal = json.loads((work / "70b" / "journal.jsonl").read_text())
    row = {name: journal[name] for name in ("loss_before", "loss_after", "kl_before", "kl_after")}
    row |= {"peak_bytes": peak, "seconds": f"{seconds:.1f}", "block_seconds": f"{journal['seconds']:.1f}"}
    print(row)
    _write("scale_70b.csv", [row])
    shutil.rmtree(model)


def run(
    work: Path,
    name: str,
    model: Path,
    plan: list[dict[str, Any]],
    data: dict[str, Any],
    precision: str = "32-true",
    accelerator: str = "cpu",
) -> tuple[float, int]:
    """Run `lfq run`; return its seconds and its peak resident bytes, both as it measures them itself.

    (What the system reports of a child includes the memory of the process that started it.)
    """
    config = work / f"{name}.json"
    trainer = {"accelerator": accelerator, "precision": precision, "logger": False}
    content = {"model": {"checkpoint": str(model)}, "data": data, "plan": plan, "trainer": trainer}
    config.write_text(json.dumps({**content, "output": str(work / name)}))
    command = [sys.executable, "-m", "lfq_lightning", "run", "--config", str(config), "--overwrite", "true"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    metrics = json.loads((work / name / "metrics.json").read_text())
    return metrics["seconds"], metrics["peak_bytes"]


def save_wide(folder: Path, shape: dict[str, int], blocks: int) -> None:
    """Save blocks, embedding, norm and head, shard by shard: of a 70B's sizes they are more than half of 24 GB."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"vocab_size": VOCABULARY, **shape}
    config = LlamaConfig(**shape, num_hidden_layers=blocks, eos_token_id=256, bos_token_id=None)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    save_tokenizer(folder)
    hidden, between, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_key_value_heads"]
    heads *= hidden // shape["num_attention_heads"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (heads, hidden)}
    shapes |= {"self_attn.v_proj": (heads, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (between, hidden), "mlp.up_proj": (between, hidden), "mlp.down_proj": (hidden, between)}
    shards: list[dict[str, tuple[int, ...]]] = []
    norms: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for index in range(blocks):
        shards.append({f"model.layers.{index}.{name}.weight": size for name, size in shapes.items()})
        norms |= {f"model.layers.{index}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    words = (shape["vocab_size"], hidden)
    shards += [{"model.embed_tokens.weight": words}, {"lm_head.weight": words}, norms]
    torch.manual_seed(0)
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number}.safetensors"
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.randn(size, dtype=torch.bfloat16) * size[1] ** -0.5
            for name, size in shard.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _r_squared(x: tuple[int, ...], y: list[float]) -> float:
    line, mean = linear_regression(x, y), sum(y) / len(y)
    left = sum((value - line.intercept - line.slope * at) ** 2 for at, value in zip(x, y, strict=True))
    return 1 - left / sum((value - mean) ** 2 for value in y)


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
