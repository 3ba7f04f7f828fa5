"""Render chat templates, which are programs that come with a model: within limits, and an error is a sentence."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from lfq_lightning.errors import UserError, named
from lfq_lightning.models.limits import limits

Message = dict[str, Any]  # role, content, and what else a template reads

WITHIN = "the chat template", "mend the template"  # what `limits` says
_CHARACTERS = 2**24
_PROBE: list[Message] = [{"role": "user", "content": "Hello."}]


class TemplateError(UserError):
    """A template refuses these messages, or stumbles over them; others it may take."""


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
        with limits(*WITHIN):
            text = tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=name, tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except UserError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise TemplateError(
            f"the chat template fails ({named(error, 150)}) on {str(messages)[:80]}…; mend "
            "the template, or the messages."
        ) from error
    if not isinstance(text, str) or len(text) > _CHARACTERS:
        raise UserError("the chat template makes an endless text; mend the template.")
    return text


def check_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """Render each of a tokenizer's chat templates once. Raises UserError for one that hangs or grows without end.

    One that only refuses the probe passes: it may want other messages, and what uses it says so.
    """
    templates = tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else [None] if templates else []:
        try:
            render(tokenizer, _PROBE, name=name)
        except TemplateError:
            continue
