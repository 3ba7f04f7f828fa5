"""Let a loaded model answer, and show the answer while it comes."""

import logging

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from lfq_lightning.data.chosen_token import ChosenToken
from lfq_lightning.data.prompt_tokens import check_tokens, prompt_tokens
from lfq_lightning.data.self_generate import end_ids
from lfq_lightning.errors import one_line
from lfq_lightning.models.chat_template import Message, render
from lfq_lightning.packed.decoder import Decoder, decodable
from lfq_lightning.packed.sampler import Sampler

log = logging.getLogger(__name__)

_ROUNDED = 1024  # a cache's length is a multiple of so many tokens


class Writer:
    """A model that continues one prompt after another.

    On a GPU it writes through a `Decoder`, whose graph later prompts use again; on a CPU, and where a model's step
    cannot be captured, through transformers' `generate`.

    Args:
        model: as `load` gives it.
        sampler: which chooses each token; greedy if not said.
    """

    def __init__(self, model: PreTrainedModel, sampler: Sampler | None = None) -> None:
        self.model = model
        self.sampler = sampler or Sampler()
        self._captures = model.device.type == "cuda" and decodable(model)
        self._decoder: Decoder | None = None

    def write(self, prompt: Tensor, max_new_tokens: int, ends: set[int], streamer: BaseStreamer | None) -> list[int]:
        """Return the tokens that follow a prompt, int64 (1, T), up to one of `ends`, or all if there is none of these.

        Each goes to the streamer as it comes.
        """
        if not self._captures:
            with torch.no_grad():
                output = self.model.generate(  # type: ignore[operator]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    logits_processor=LogitsProcessorList(
                        [ChosenToken(self.sampler)] if self.sampler.temperature else []
                    ),
                    max_new_tokens=max_new_tokens,
                    min_new_tokens=None if ends else max_new_tokens,
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=min(ends, default=0),
                    streamer=streamer,
                )
            return list(output[0, prompt.shape[1] :].tolist())
        length = prompt.shape[1] + max_new_tokens
        if self._decoder is None or self._decoder.length < length:
            self._decoder = None  # its cache is released before there is another
            try:
                self._decoder = Decoder(self.model, -(-length // _ROUNDED) * _ROUNDED, True, self.sampler)
            except (RuntimeError, TypeError) as error:  # its step asks the host, which a capture forbids
                log.info("tokens are launched one by one: the step cannot be captured (%s)", one_line(error))
                self._captures = False
                return self.write(prompt, max_new_tokens, ends, streamer)
        found = []
        if streamer is not None:
            streamer.put(prompt.cpu())
        for token in self._decoder.answer(prompt, max_new_tokens, ends):
            found.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        return found


def answer(
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    max_new_tokens: int,
    stream: bool = False,
) -> str:
    """Return the model's answer to a conversation, put through its chat template if it has one.

    Without a template the model continues the last message. With `stream` the text is printed as it comes.
    """
    model, template = writer.model, bool(tokenizer.chat_template)
    text = messages[-1]["content"]
    if template:
        text = render(tokenizer, messages, add_generation_prompt=True)
    ids = prompt_tokens(tokenizer, text, special=not template)
    check_tokens([ids], model.config.get_text_config().vocab_size, tokenizer)
    inputs = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    ends = end_ids(model.generation_config, model.config, tokenizer)
    return str(tokenizer.decode(writer.write(inputs, max_new_tokens, ends, streamer), skip_special_tokens=True))
