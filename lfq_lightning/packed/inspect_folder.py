"""What a packed folder holds, layer by layer."""

from rich.console import Console
from rich.table import Table

from lfq_lightning.grids import IntegerGrid
from lfq_lightning.models.checkpoints.checkpoint import read_generation_config, read_tokenizer
from lfq_lightning.packed.engines import engines, fused_differently
from lfq_lightning.packed.packed_folder import PackedFolder


def inspect_folder(path: str) -> None:
    """Print each layer's scheme, bits per weight and size, the totals, and which engines load the folder.

    Raises UserError for a folder that cannot be read; every shard is checked.
    """
    folder, console = PackedFolder(path), Console(markup=False)
    read_tokenizer(folder.path)
    read_generation_config(folder.path)
    sizes = {layer: size for shard in folder.shards() for layer, size in shard.packed_bytes.items()}
    table = Table(title=f"{folder.path}: {folder.format_name}", title_justify="left")
    for column in ("layer", "outputs × inputs", "bits", "group", "grid", "bits per weight", "MB"):
        table.add_column(column)
    for name, scheme in folder.schemes.items():
        o, i = folder.shapes[name]
        group = "channel" if scheme.group_size == -1 else str(scheme.group_size)
        integers = "symmetric" if scheme.symmetric else "asymmetric"
        grid = integers if isinstance(scheme, IntegerGrid) else str(scheme)
        per_weight = 8 * sizes[name] / (o * i)
        table.add_row(
            name, f"{o} × {i}", str(scheme.num_bits), group, grid, f"{per_weight:.2f}", f"{sizes[name] / 1e6:.2f}"
        )
    console.print(table)
    weights = sum(folder.shapes[name][0] * folder.shapes[name][1] for name in folder.schemes)
    packed, whole = sum(sizes.values()), sum((folder.path / file).stat().st_size for file in folder.files)
    console.print(f"packed layers: {packed / 1e6:.1f} MB, {8 * packed / max(weights, 1):.2f} bits per weight")
    console.print(f"all shards: {whole / 1e6:.1f} MB; not packed: {', '.join(folder.dense) or 'no linear layer'}")
    if folder.changed:
        console.print(f"not what was written: {', '.join(folder.changed)} (the checksum differs)")
    mixed = fused_differently(folder.schemes, folder.dense)
    if mixed:
        console.print(f"not vLLM, which computes them as one matrix: {' and '.join(mixed)} have different schemes")
    loads = engines(folder.format, folder.schemes, folder.dense)
    console.print(f"loads in: {', '.join(['lfq_lightning', *loads])}")
