"""`lfq generate MODEL "PROMPT"`: let a packed model answer."""

from lfq_lightning.commands.command_line import (
    MODEL_DIR,
    add_sampling,
    check_positive,
    log_to_stderr,
    parser,
    sampler_of,
)


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("generate", "Print a packed model's answer.")
    ours.add_argument("model", metavar="MODEL", help=MODEL_DIR)
    ours.add_argument("prompt", metavar="PROMPT", help="what to say to the model; goes through its chat template")
    ours.add_argument("--max-new-tokens", type=int, default=100, help="longest answer (default: 100)")
    add_sampling(ours)
    options = ours.parse_args(arguments)
    check_positive(options, "max_new_tokens")
    sampler = sampler_of(options)
    from lfq_lightning.ops.path import best_device
    from lfq_lightning.packed.generate import Writer, answer
    from lfq_lightning.packed.load_model import load

    log_to_stderr()
    model, tokenizer = load(options.model, device=best_device())
    messages = [{"role": "user", "content": options.prompt}]
    answer(Writer(model, sampler), tokenizer, messages, options.max_new_tokens, stream=True)
