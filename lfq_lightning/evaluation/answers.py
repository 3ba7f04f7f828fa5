"""Answers: what a model has answered so far, on disk, so that an evaluation that ends early resumes from there."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lfq_lightning.write_file import append_lines, write_text, writing


class Answers:
    """A file of JSON lines, one per question.

    Args:
        file: made when the first answer comes. A torn last line, of a process that was killed, is dropped.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, Any] = {}
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if len(text) > sum(map(len, whole)):
            write_text(file, "".join(whole))
        for line in whole:
            entry = json.loads(line)
            self._known[entry["question"]] = entry["answer"]

    def __contains__(self, question: Any) -> bool:
        return _key(question) in self._known

    def __getitem__(self, question: Any) -> Any:
        return self._known[_key(question)]

    def add(self, questions: list[Any], answers: list[Any]) -> None:
        """Keep answers (JSON values), on the disk before this returns."""
        lines = []
        for question, answer in zip(questions, answers, strict=True):
            self._known[_key(question)] = answer
            lines.append(json.dumps({"question": _key(question), "answer": answer}))
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        append_lines(self.file, lines)


def _key(question: Any) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
