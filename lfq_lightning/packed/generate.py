"""Let a loaded model answer, greedily, and show the answer while it comes."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lfq_lightning.data.prompt_tokens import check_tokens, prompt_tokens
from lfq_lightning.models.chat_template import Message, render


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    max_new_tokens: int,
    stream: bool = False,
) -> str:
    """Return the model's greedy answer to a conversation, put through its chat template if it has one.

    Without a template the model continues the last message. With `stream` the text is printed as it comes.
    """
    template = bool(tokenizer.chat_template)
    text = messages[-1]["content"]
    if template:
        text = render(tokenizer, messages, add_generation_prompt=True)
    ids = prompt_tokens(tokenizer, text, special=not template)
    check_tokens([ids], model.config.get_text_config().vocab_size, tokenizer)
    inputs = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
        )
    return str(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))
