"""`lfq generate MODEL "PROMPT"`: let a packed model answer."""

from lfq_lightning.commands.command_line import add_answering, log_to_stderr, parser, sampler_of


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("generate", "Print a packed model's answer.")
    add_answering(ours, longest=100)
    ours.add_argument("prompt", metavar="PROMPT", help="what to say to the model; goes through its chat template")
    options = ours.parse_args(arguments)
    sampler = sampler_of(options)
    from lfq_lightning.ops.path import best_device
    from lfq_lightning.packed.generate import Writer, answer
    from lfq_lightning.packed.load_model import load

    log_to_stderr()
    model, tokenizer = load(options.model, device=best_device())
    messages = [{"role": "user", "content": options.prompt}]
    answer(Writer(model, sampler), tokenizer, messages, options.max_new_tokens, stream=True)
