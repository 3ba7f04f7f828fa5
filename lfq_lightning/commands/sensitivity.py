"""`lfq sensitivity MODEL --dataset TEXT --average-bits 3.5`: rank layers by what they lose; propose mixed widths."""

import argparse
from pathlib import Path

from lfq_lightning.commands.command_line import parser


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("sensitivity", "Rank layers by the KL of quantising each alone, and propose mixed widths.")
    ours.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a hub id, or a .gguf file")
    ours.add_argument("--dataset", required=True, help="a .txt, a .jsonl or a hub name")
    ours.add_argument("--average-bits", type=float, required=True, help="bits per weight, scales not counted")
    ours.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="widths to choose from (2 3 4)")
    ours.add_argument("--group-size", type=int, default=-1, help="-1 is per output channel (the default)")
    ours.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    ours.add_argument("--num-samples", type=int, default=8, help="sequences to measure on (8)")
    ours.add_argument("--seq-len", type=int, default=256, help="tokens per sequence (256)")
    ours.add_argument("--output", type=Path, help="write the plan to this YAML too")
    options = ours.parse_args(arguments)
    from lfq_lightning.grids.integer_grid import IntegerGrid
    from lfq_lightning.planning.sensitivity_report import sensitivity_report

    sensitivity_report(
        options.model,
        options.dataset,
        options.average_bits,
        [IntegerGrid(bits, options.group_size, options.symmetric) for bits in sorted(set(options.bits))],
        options.num_samples,
        options.seq_len,
        options.output,
    )
