"""`lfq list`: every objective, quantizer, stage, callback and format with its options and source."""

import inspect
from typing import Any

from rich.console import Console
from rich.table import Table

from lfq_lightning.callbacks import CALLBACKS
from lfq_lightning.commands.command_line import parser
from lfq_lightning.formats import FORMATS
from lfq_lightning.grids import GRIDS
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer
from lfq_lightning.registry import Registry
from lfq_lightning.stages import STAGES


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser("list", "Print every objective, quantizer, stage, callback and format.").parse_args(arguments)
    print_plugins()


def print_plugins() -> None:
    """Print one table per registry."""
    console = Console(width=max(100, Console().width))
    registries: list[Registry[Any]] = [OBJECTIVES, QUANTIZERS, STAGES, CALLBACKS, GRIDS, FORMATS]
    for registry in registries:
        table = Table(title=f"{registry.kind}s", title_justify="left", show_lines=True)
        for column in ("name", "what", "options", "source"):
            table.add_column(column)
        for name in registry.names():
            cls = registry.get(name)
            options = dict(registry.options(name))
            if issubclass(cls, LearnedQuantizer):
                options["init"] = cls.default_init
            what = (inspect.getdoc(cls) or "").partition("\n")[0]
            listed = "\n".join(f"{option}={default!r}" for option, default in options.items())
            table.add_row(name, what, listed or "-", vars(cls)["paper"])
        console.print(table)
    console.print("every quantizer also takes bits=4, group_size=-1 (per output channel), symmetric=True; or grid=NAME")
