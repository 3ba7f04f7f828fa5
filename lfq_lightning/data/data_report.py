"""What calibration data look like, before anything is calibrated on them."""

from collections import Counter

import torch
from rich.console import Console
from rich.table import Table

from lfq_lightning.data import CalibrationData
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.token_set import TokenSet

_BINS = 8  # of the histogram of lengths
_SHOWN = 400  # characters of an example
_BAR = 40


def print_data(model: str, data: CalibrationData, device: torch.device, examples: int) -> None:
    """Make the data as a run would, and print sizes, lengths, the commonest tokens, and some sequences.

    Raises UserError for what a run would refuse.
    """
    checkpoint, console = open_checkpoint(model), Console(highlight=False, soft_wrap=True, markup=False)
    data.check(checkpoint)
    train, held_out = data.token_sets(checkpoint, device)
    tokenizer = checkpoint.tokenizer()
    table = Table(title_justify="left")
    for column in ("", "sequences", "tokens", "mean length", "pads", "different tokens", "alike"):
        table.add_column(column, justify="left" if not column else "right")
    for name, tokens in (("calibration", train), ("held out", held_out)):
        table.add_row(name, *_numbers(tokens))
    console.print(table)
    lengths = train.mask.sum(1)
    console.print(f"lengths of the calibration sequences, up to {data.seq_len}:")
    edges = torch.linspace(0, data.seq_len, _BINS + 1)
    counts = torch.histc(lengths.float(), bins=_BINS, min=0, max=data.seq_len).long().tolist()
    for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts, strict=True):
        console.print(f"{low:7.0f} … {high:5.0f}  {count:5}  {'█' * (_BAR * count // max(1, *counts))}")
    often = Counter(train.input_ids[train.mask].tolist()).most_common(12)
    console.print("commonest: " + ", ".join(f"{tokenizer.decode([token])!r} {count}" for token, count in often))
    for number in range(min(examples, len(train))):
        text = str(tokenizer.decode(train.input_ids[number][train.mask[number]]))
        cut = f"{text[:_SHOWN]} …" if len(text) > _SHOWN else text
        console.print(f"\n--- sequence {number}, {int(lengths[number])} tokens\n{cut}")


def _numbers(tokens: TokenSet) -> list[str]:
    real = int(tokens.mask.sum())
    rows = {bytes(row[mask].numpy().tobytes()) for row, mask in zip(tokens.input_ids, tokens.mask, strict=True)}
    return [
        str(len(tokens)),
        str(real),
        f"{real / len(tokens):.0f}",
        f"{1 - real / tokens.mask.numel():.1%}",
        str(len(tokens.input_ids[tokens.mask].unique())),
        str(len(tokens) - len(rows)),
    ]
