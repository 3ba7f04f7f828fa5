"""`lfq chat MODEL`: talk with a packed model."""

import sys
from typing import TYPE_CHECKING

from lfq_lightning.commands.command_line import add_answering, log_to_stderr, parser, sampler_of
from lfq_lightning.errors import UserError

if TYPE_CHECKING:
    from lfq_lightning.packed.sampler import Sampler


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("chat", "Talk with a packed model; an empty line ends it.")
    add_answering(ours, longest=300)
    options = ours.parse_args(arguments)
    sampler = sampler_of(options)
    log_to_stderr()
    chat(options.model, options.max_new_tokens, sampler)


def chat(folder: str, max_new_tokens: int, sampler: "Sampler") -> None:
    """Read a line, print the answer, remember both; until the input ends or an empty line.

    Raises UserError if the model has no chat template.
    """
    from lfq_lightning.models.chat_template import Message
    from lfq_lightning.ops.path import best_device
    from lfq_lightning.packed.generate import Writer, answer
    from lfq_lightning.packed.load_model import load

    model, tokenizer = load(folder, device=best_device())
    if not tokenizer.chat_template:
        raise UserError(f"{folder} has no chat template, so it is no chat model; use `lfq generate`.")
    writer, messages = Writer(model, sampler), list[Message]()
    while line := _line():
        messages.append({"role": "user", "content": line})
        messages.append(
            {"role": "assistant", "content": answer(writer, tokenizer, messages, max_new_tokens, stream=True)}
        )


def _line() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()
