"""A checkpoint's small files as they ship: tokenizer, chat templates, generation config, licences."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.models.chat_template import check_templates
from lfq_lightning.models.checkpoints.checkpoint import Checkpoint, read_generation_config, read_tokenizer

_TOKENIZER_CONFIG = "tokenizer_config.json"
_NEW_CLASS, _KNOWN_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"  # of transformers 5, and what 4 knows
_PATHS = ("name_or_path", "tokenizer_file", "vocab_file", "merges_file")  # keys that may hold paths of this machine


def check_small_files(checkpoint: Checkpoint) -> None:
    """Write a checkpoint's small files into a scratch folder, read them back, and render every chat template.

    Raises UserError for a file that cannot be read, written again, or used.
    """
    check_templates(checkpoint.tokenizer())
    with tempfile.TemporaryDirectory() as scratch:
        write_small_files(checkpoint, Path(scratch))
        read_tokenizer(Path(scratch))
        read_generation_config(Path(scratch))


def write_small_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write them into a folder. Raises UserError if one cannot be written; OSError of a full disk is let through."""
    try:
        checkpoint.tokenizer().save_pretrained(folder)
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever a tokenizer's class says
        raise UserError(f"{checkpoint.path}: its tokenizer cannot be saved ({one_line(error)[:200]}).") from error
    _edit(folder / _TOKENIZER_CONFIG, _tokenizer_class(checkpoint))
    generation = checkpoint.generation_config()
    if generation is not None:
        _write_generation_config(generation, folder / "generation_config.json", checkpoint.path)
    for file in (*checkpoint.licences(), *checkpoint.processors()):
        shutil.copyfile(file, folder / file.name)


def _write_generation_config(generation: GenerationConfig, file: Path, source: object) -> None:
    """Write it as it is. `save_pretrained` refuses values that it has read itself, such as an unused temperature."""
    try:
        text = generation.to_json_string()
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: generation_config.json cannot be written ({one_line(error)[:200]}).") from error
    file.write_text(text, encoding="utf-8")


def _tokenizer_class(checkpoint: Checkpoint) -> str | None:
    """Return the class that the source names; readers of transformers 4 do not know each one that 5 writes."""
    source = checkpoint.path / _TOKENIZER_CONFIG
    try:
        return json.loads(source.read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):  # none there: a GGUF, or a folder that leaves it to the model
        return None


def _edit(file: Path, named: str | None) -> None:
    """Put the source's class into a saved tokenizer_config.json, and take this machine's paths out of it."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    written = content.get("tokenizer_class")
    chosen = named or written
    if chosen is not None:
        content["tokenizer_class"] = _KNOWN_CLASS if chosen == _NEW_CLASS else chosen
    content = {key: value for key, value in content.items() if key not in _PATHS}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
