"""The logit loss under sharding: gather the head, or keep its rows at home and send tokens?

    torchrun --nproc-per-node 2 -m benchmarks.head_sharding

Each rank has its own tokens and a share of the head's rows. `gathered` (what FSDP2 does) makes the head whole on every
rank, which then passes over its own tokens; the logits exist a tile at a time. `vocabulary` sends every rank all
tokens, passes over its own rows, and merges log-sum-exps and moments. Both give logsumexp(W h) and Wᵀ softmax(W h) of
the rank's tokens, from which loss and gradient follow. Medians of alternating rounds. Writes
benchmarks/results/head_sharding.csv.
"""

import csv
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lfq_lightning.ops.linear_soft_ce import logit_moment

RESULTS = Path(__file__).parent / "results" / "head_sharding.csv"
CASES = [(49152, 576, 256), (49152, 576, 2048), (49152, 576, 8192), (128256, 2048, 1024), (32000, 288, 2048)]
ROUNDS = 5


def gathered(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return lse (M,) and moment (M, D) of this rank's `hidden` (M, D), by the whole head."""
    head = rows.new_empty(len(rows) * dist.get_world_size(), rows.shape[1])
    dist.all_gather_into_tensor(head, rows)
    return logit_moment(hidden, head)


def vocabulary(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same; every rank passes over its `rows` for all tokens."""
    size = dist.get_world_size()
    everyone = hidden.new_empty(len(hidden) * size, hidden.shape[1])
    dist.all_gather_into_tensor(everyone, hidden)
    lse, moment = logit_moment(everyone, rows)
    parts = lse.new_empty(size * len(lse))
    dist.all_gather_into_tensor(parts, lse)
    whole = parts.view(size, -1).logsumexp(0)
    moment *= (lse - whole).exp()[:, None]
    mine = torch.empty_like(hidden)
    dist.reduce_scatter_tensor(mine, moment)
    return whole.view(size, -1)[dist.get_rank()], mine


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    size, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for words, width, tokens in CASES:
        generator = torch.Generator().manual_seed(rank)
        hidden = torch.randn(tokens, width, generator=generator)
        rows = torch.randn(words // size, width, generator=generator) * width**-0.5
        ways = {"gathered": gathered, "vocabulary": vocabulary}
        results = {name: way(hidden, rows) for name, way in ways.items()}
        for ours, theirs in zip(*results.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                dist.barrier()
                started = time.perf_counter()
                way(hidden, rows)
                dist.barrier()
                seconds[name].append(time.perf_counter() - started)
        row = {"ranks": size, "words": words, "width": width, "tokens_per_rank": tokens}
        row |= {f"{name}_seconds": f"{median(values):.4f}" for name, values in seconds.items()}
        row |= {"gathered_bytes": 4 * words * width, "vocabulary_bytes": 2 * 4 * tokens * size * width}
        found.append(row)
        if rank == 0:
            print(row, flush=True)
    if rank == 0:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
