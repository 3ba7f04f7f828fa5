"""`lfq inspect MODEL`: of a packed one schemes, sizes, and which engines load it; of another what a run would find."""

from lfq_lightning.commands.command_line import MODEL_DIR, parser


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser(
        "inspect",
        "Print each layer's scheme and size, and which engines load the model; of a model that is not packed, what was "
        "found in it and what can be packed.",
    )
    ours.add_argument("model", metavar="MODEL", help=f"{MODEL_DIR}; or a full-precision one")
    options = ours.parse_args(arguments)
    from lfq_lightning.packed.inspect_folder import inspect_folder
    from lfq_lightning.packed.packed_folder import is_packed

    if is_packed(options.model):
        inspect_folder(options.model)
    else:
        from lfq_lightning.models.describe import describe_model

        describe_model(options.model)
