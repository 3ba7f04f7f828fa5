"""A Llama of random weights, with a byte tokenizer, for measurements that need a size and no sense."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_random_llama(folder: Path, blocks: int, hidden: int, intermediate: int, words: int = 512) -> None:
    """Save a bf16 Llama with tied embeddings; weights are drawn so that signals keep their size through the blocks."""
    torch.manual_seed(blocks)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        initializer_range=hidden**-0.5,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of bytes, and the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
