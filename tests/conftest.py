"""Tiny random models of each family, with a byte tokenizer, made on the spot: the tests need no downloads."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lfq_lightning.models.families import FAMILIES

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

CHAT_TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
EXTRA: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma2": {
        "sliding_window": 8,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "phi": {"partial_rotary_factor": 0.5},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-kernel", action="store_true", help="compile every kernel for every GPU, not one of each kind (minutes)"
    )


def byte_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<u>", "<a>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(
    folder: Path, family: str = "llama", tied: bool = True, chat: bool = False, dtype=torch.float32, **changes: Any
) -> Path:
    """Save a random model whose blocks matter (large weights), and its tokenizer."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SHAPE, **EXTRA.get(family, {}), "tie_word_embeddings": tied, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "layers" in name else 0.5))
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer(chat).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param, tied=request.param != "qwen3")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of 20 … 98 bytes."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("<|endoftext|>".join(f"{i} bottles of beer on wall {i}; " * (1 + i % 3) for i in range(40)))
    return file


FLEXROUND = {"name": "flexround", "bits": 3, "group_size": 16, "init": "gptq"}
GPTQ = {"name": "gptq", "bits": 3, "group_size": 16}


@pytest.fixture
def config(tmp_path: Path, llama: Path, text_file: Path) -> Callable[..., Path]:
    """Return a function that writes a small YAML (JSON is YAML) with changes and returns its path."""

    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "seed_everything": 7,
            "model": {"checkpoint": str(llama)},
            "data": {"dataset": str(text_file), "num_samples": 12, "seq_len": 32, "num_held_out": 5},
            "plan": [
                {"match": "last", "quantizer": FLEXROUND, "objective": "logit_ce", "steps": 8, "batch_size": 4},
                {"match": "all", "quantizer": GPTQ},
            ],
            "trainer": {"accelerator": "cpu", "precision": "32-true"},
            "output": str(tmp_path / "run"),
        }
        for key, value in changes.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(content))
        return file

    return write


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Return where Triton kernels run: in the interpreter, on CPU tensors, unless there is a GPU."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("needs a GPU" if request.param == "cuda" else "a GPU is there: kernels are compiled")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.empty and empty_like return NaN, or the largest integer, everywhere: what a kernel forgets shows."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
