"""`lfq inspect MODEL`: schemes, sizes, and which engines load it."""

from lfq_lightning.commands.command_line import MODEL_DIR, parser


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("inspect", "Print each layer's scheme and size, and which engines load the model.")
    ours.add_argument("model", metavar="MODEL", help=MODEL_DIR)
    options = ours.parse_args(arguments)
    from lfq_lightning.packed.inspect_folder import inspect_folder

    inspect_folder(options.model)
