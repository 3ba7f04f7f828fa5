"""`lfq bench MODEL`: tokens per second and memory, against the same model dense."""

from lfq_lightning.commands.command_line import MODEL_DIR, check_positive, parser


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("bench", "Measure prefill, decode and memory of a packed model and of the same one dense.")
    ours.add_argument("model", metavar="MODEL", help=MODEL_DIR)
    ours.add_argument("--prompt-tokens", type=int, default=128, help="random tokens to read (128)")
    ours.add_argument("--new-tokens", type=int, default=64, help="tokens to write (64)")
    options = ours.parse_args(arguments)
    check_positive(options, "prompt_tokens", "new_tokens")
    from lfq_lightning.packed.decode_speed import bench

    bench(options.model, options.prompt_tokens, options.new_tokens)
