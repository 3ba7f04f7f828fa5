"""Read prompts for a model to answer."""

from pathlib import Path
from typing import Any

from lfq_lightning.data.read_text import lines_of, mend, read_jsonl, read_text
from lfq_lightning.errors import UserError
from lfq_lightning.file_names import user_path


def read_prompts(path: Path, where: str) -> list[str]:
    """Return the lines of a .txt, or of a .jsonl the field `prompt` or `question` (as GSM8K has it).

    Raises UserError, beginning with `where`, if the file cannot be read, has none, or a row has no prompt.
    """
    path = user_path(path, where)
    if path.suffix.lower() == ".jsonl":
        prompts = [_prompt(row, place) for place, row in read_jsonl(path, where)]
    else:
        prompts = [line for line in lines_of(read_text(path, where)) if line.strip()]
    if not prompts:
        raise UserError(f"{where}: {path} is empty; give a prompt a line.")
    return prompts


def _prompt(row: Any, place: str) -> str:
    prompt = row.get("prompt", row.get("question")) if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{place} has no `prompt` or `question` that is a text; mend the row.")
    return mend(prompt)
