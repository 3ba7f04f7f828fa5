"""What the commands' parsers have in common."""

import argparse
import logging
import sys

from lfq_lightning.errors import UserError

MODEL_DIR = "a packed model: output folder of `lfq run` or `lfq export`, or another tool's"


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return an empty parser of a command."""
    return argparse.ArgumentParser(prog=f"lfq {command}", description=description, allow_abbrev=False)


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise UserError for a number below 1."""
    for name in names:
        if vars(options)[name] is not None and vars(options)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")


def log_to_stderr() -> None:
    """Let the log be seen, beside what the command prints."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("lfq_lightning").setLevel(logging.INFO)
