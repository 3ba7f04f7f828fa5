"""Render chat templates, which are programs that come with a model: within limits, and an error is a sentence."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from lfq_lightning.errors import UserError, one_line

Message = dict[str, Any]  # role, content, and what else a template reads

_SECONDS = 10.0  # of CPU time; a usual template takes milliseconds
_BYTES = 2**30  # of memory
_CHARACTERS = 2**24
_PROBE: list[Message] = [{"role": "user", "content": "Hello."}]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
    name: str | None = None,
) -> str:
    """Return the text of a conversation by the tokenizer's chat template.

    Args:
        tools: descriptions of functions, for templates that write them.
        name: of one of several templates; transformers chooses if None.

    Raises UserError if the template fails, refuses, or does not end.
    """
    try:
        with limits():
            text = tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=name, tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except UserError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise UserError(
            f"the chat template fails ({type(error).__name__}: {one_line(error)[:150]}) on {str(messages)[:80]}…; mend "
            "the template, or the messages."
        ) from error
    if not isinstance(text, str) or len(text) > _CHARACTERS:
        raise UserError("the chat template makes an endless text; mend the template.")
    return text


def check_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render each of a tokenizer's chat templates once. Raises UserError for one that hangs or grows without end.

    One that only refuses or fails on the probe passes: it may want other messages, and what uses it says so.
    """
    templates = tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else [None] if templates else []:
        try:
            render(tokenizer, _PROBE, name=name)
        except UserError as error:
            if error.__cause__ is None or isinstance(error.__cause__, _TooLongError | MemoryError):
                raise


class _TooLongError(Exception):
    """Raised in the middle of a template by the timer."""


@contextmanager
def limits() -> Iterator[None]:
    """Limit CPU time and memory of the templates rendered inside; where the system can, in the main thread only.

    Raises UserError if one does not end.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    if sys.platform == "linux":  # elsewhere the address space is not limited, or not known
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = held + _BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
    try:
        yield
    except _TooLongError as error:
        raise UserError(f"the chat template does not end within {_SECONDS:.0f} s; mend the template.") from error
    except MemoryError as error:
        raise UserError("the chat template grows without end; mend the template.") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise _TooLongError
