"""Train a small Qwen3 on a text file in minutes, for benchmarks on another architecture; the same bytes every time.

It learns the first two thirds of the stories; unseen.txt beside it has the others, to calibrate and to measure it on. A
model that knows its calibration text by heart says little of how it will do on any other.

python -m benchmarks.quality.train_tiny tinystories.txt runs/tiny-qwen3
"""

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from lfq_lightning.precision import faster_than_fp32

SEPARATOR = "<|endoftext|>"
VOCABULARY, LENGTH, BATCH, STEPS, LR = 2048, 256, 8, 800, 3e-3


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that starts each text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--width", type=int, default=128, help="of hidden states; llama.cpp's K-quants need 256")
    given = parser.parse_args()
    torch.manual_seed(0)
    text = given.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    stories = [story.strip() for story in text.split(SEPARATOR) if story.strip()]
    known = len(stories) * 2 // 3
    stream, unseen = (
        torch.tensor([i for story in part for i in [*tokenizer(story)["input_ids"], tokenizer.eos_token_id]])
        for part in (stories[:known], stories[known:])
    )
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=given.width,
        intermediate_size=3 * given.width,
        num_hidden_layers=6,
        num_attention_heads=given.width // 32,
        num_key_value_heads=given.width // 64,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS, pct_start=0.05)
    fast = faster_than_fp32(torch.bfloat16)
    started = time.perf_counter()
    for step in range(STEPS):
        starts = torch.randint(0, len(stream) - LENGTH, (BATCH,))
        rows = torch.stack([stream[start : start + LENGTH] for start in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
            loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step}  loss {float(loss.detach()):.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    (given.output / "unseen.txt").write_text(SEPARATOR.join(stories[known:]), encoding="utf-8")
    rows = unseen[: len(unseen) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) for part in rows.split(BATCH)]
    print(f"loss on the {len(stories) - known} other stories: {sum(losses) / len(losses):.3f}")


if __name__ == "__main__":
    main()
