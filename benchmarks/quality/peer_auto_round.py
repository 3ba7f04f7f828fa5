"""AutoRound on given tokens, in its own environment; leaves the dequantised model behind.

    PEER_PYTHON benchmarks/quality/peer_auto_round.py MODEL TOKENS OUTPUT --bits 3 --group-size 96 --steps 200

Needs `auto-round` and nothing of ours. Prints the seconds that quantising took.
"""

import argparse
import time

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", help="safetensors with input_ids int64 (N, T) and mask bool (N, T)")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    stored = load_file(given.tokens)
    tokens, mask = stored["input_ids"], stored["mask"].to(torch.int64)
    rows = [{"input_ids": row, "attention_mask": keep} for row, keep in zip(tokens, mask, strict=True)]
    started = time.perf_counter()
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(given.model),
        bits=given.bits,
        group_size=given.group_size,
        sym=given.symmetric,
        iters=given.steps,
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=given.batch_size,
        dataset=DataLoader(rows, batch_size=given.batch_size),
        device_map="cpu",
        enable_torch_compile=False,
        seed=given.seed,
    )
    quantised, _ = tuner.quantize()
    print(f"seconds {time.perf_counter() - started:.2f}")
    quantised.save_pretrained(given.output)


if __name__ == "__main__":
    main()
