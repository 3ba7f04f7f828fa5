"""`lfq export MODEL --format gptq --output DIR`: the same model for another engine; nothing is calibrated again."""

from pathlib import Path

from lfq_lightning.commands.command_line import MODEL_DIR, parser
from lfq_lightning.errors import UserError


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("export", "Write a packed model in another format; nothing is calibrated again.")
    ours.add_argument("model", metavar="MODEL", help=MODEL_DIR)
    ours.add_argument("--format", required=True, help="gguf, or one of those that `lfq list` shows")
    ours.add_argument("--output", required=True, help="new folder, or for gguf a new file")
    ours.add_argument(
        "--like",
        metavar="FILE.gguf",
        help="with gguf: the same model as llama.cpp converts it, of any architecture; all but its weights is kept",
    )
    ours.add_argument("--plugins", type=Path, nargs="+", default=[], help="Python files with formats of your own")
    options = ours.parse_args(arguments)
    for file in options.plugins:
        from lfq_lightning.registry import load_plugin_file

        load_plugin_file(file)
    if options.like is not None and options.format != "gguf":
        raise UserError("--like goes with --format gguf only.")
    if options.like is not None:
        from lfq_lightning.packed.gguf_like import export_like

        print(export_like(options.model, options.output, options.like))
    elif options.format == "gguf":
        from lfq_lightning.packed.gguf_export import export_gguf

        print(export_gguf(options.model, options.output))
    else:
        from lfq_lightning.packed.export import export

        print(export(options.model, options.format, options.output))
