"""Tiny random models of each family, with a byte tokenizer, made on the spot: the tests need no downloads."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, and when a kernel's module is

from lfq_lightning.models.families import FAMILIES
from tests.helpers import FLEXROUND, GPTQ, save_tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also what is like something that is tested (minutes)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("thorough"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("thorough")])
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


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
