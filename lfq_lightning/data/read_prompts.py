"""Read prompts for a model to answer."""

import json
from pathlib import Path

from lfq_lightning.errors import UserError, one_line


def read_prompts(path: Path, where: str) -> list[str]:
    """Return the lines of a .txt, or of a .jsonl the field `prompt` or `question` (as GSM8K has it).

    Raises UserError, beginning with `where`, if the file cannot be read, has none, or a row has no prompt.
    """
    try:
        lines = [line for line in path.expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {path} cannot be read ({one_line(error)}); give a .txt or a .jsonl.") from error
    if not lines:
        raise UserError(f"{where}: {path} is empty; give a prompt a line.")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            prompts.append(str(row["prompt"] if "prompt" in row else row["question"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: {path} line {number} has no `prompt` or `question`; mend the row.") from error
    return prompts
