"""Let a loaded model answer, greedily, and show the answer while it comes."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

Message = dict[str, str]  # role, content


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
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(text, add_special_tokens=not template, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, streamer=streamer
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
