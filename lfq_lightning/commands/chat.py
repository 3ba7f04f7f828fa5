"""A conversation with a packed model on the terminal: `lfq chat`."""

import sys

from lfq_lightning.errors import UserError
from lfq_lightning.models.chat_template import Message
from lfq_lightning.ops.path import best_device
from lfq_lightning.packed.generate import answer
from lfq_lightning.packed.load_model import load


def chat(folder: str, max_new_tokens: int) -> None:
    """Read a line, print the answer, remember both; until the input ends or an empty line.

    Raises UserError if the model has no chat template.
    """
    model, tokenizer = load(folder, device=best_device())
    if not tokenizer.chat_template:
        raise UserError(f"{folder} has no chat template, so it is no chat model; use `lfq generate`.")
    messages: list[Message] = []
    while line := _line():
        messages.append({"role": "user", "content": line})
        messages.append(
            {"role": "assistant", "content": answer(model, tokenizer, messages, max_new_tokens, stream=True)}
        )


def _line() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()
