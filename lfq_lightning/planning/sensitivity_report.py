"""The table of sensitivities, and the plan that follows from it."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lfq_lightning.data import CalibrationData
from lfq_lightning.errors import UserError
from lfq_lightning.file_names import user_path
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.planning.sensitivity import check_average, measure_sensitivity, plan_of, propose_widths
from lfq_lightning.write_file import write_text


def sensitivity_report(
    model: str,
    dataset: str,
    average_bits: float,
    schemes: list[IntegerGrid],
    num_samples: int,
    seq_len: int,
    output: Path | None,
) -> None:
    """Print the layers by falling KL at the smallest width, and a plan whose widths average to `average_bits`.

    Raises UserError for a width, model or data that cannot be, before anything is measured.
    """
    widths = [scheme.num_bits for scheme in schemes]
    check_average(average_bits, widths)
    if output is not None and user_path(output, "--output").is_dir():
        raise UserError(f"--output: {output} is a folder; give a file.")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}.")
    checkpoint = open_checkpoint(model)
    data = CalibrationData(dataset, num_samples=num_samples, seq_len=seq_len, num_held_out=1)
    data.check(checkpoint)
    tokens, _ = data.token_sets(checkpoint, torch.device("cpu"))
    console = Console(highlight=False, soft_wrap=True, markup=False)
    measured = measure_sensitivity(checkpoint, tokens, schemes)
    layers = list(track(measured, "layers", console=console, transient=True))
    chosen = propose_widths(layers, average_bits)
    table = Table(title="KL to full precision with one layer quantised alone")
    for column in ("layer", "weights", *(f"{bits} bits" for bits in widths), "proposed"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in sorted(layers, key=lambda layer: -layer.kl[min(widths)]):
        losses = (f"{layer.kl[bits]:.5f}" for bits in widths)
        table.add_row(layer.name, f"{layer.num_weights}", *losses, f"{chosen[layer.name]}")
    console.print(table)
    weights = sum(layer.num_weights for layer in layers)
    average = sum(chosen[layer.name] * layer.num_weights for layer in layers) / weights
    console.print(f"average {average:.3f} bits per weight")
    plan = plan_of(chosen, schemes[0].group_size, schemes[0].symmetric)
    console.print(plan)
    if output is not None:
        write_text(output, plan)
