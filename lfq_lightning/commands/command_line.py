"""What the commands' parsers have in common."""

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from lfq_lightning.errors import UserError

if TYPE_CHECKING:
    from lfq_lightning.packed.sampler import Sampler

MODEL_DIR = "a packed model: output folder of `lfq run` or `lfq export`, or another tool's"


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return an empty parser of a command."""
    return argparse.ArgumentParser(prog=f"lfq {command}", description=description, allow_abbrev=False)


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise UserError for a number below 1."""
    for name in names:
        if vars(options)[name] is not None and vars(options)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")


def add_answering(ours: argparse.ArgumentParser, longest: int) -> None:
    """Add the model, the length of an answer, and the options of `sampler_of`."""
    ours.add_argument("model", metavar="MODEL", help=MODEL_DIR)
    ours.add_argument("--max-new-tokens", type=int, default=longest, help=f"longest answer (default: {longest})")
    ours.add_argument("--temperature", type=float, default=0.0, help="draw tokens; 0 takes the likeliest (default: 0)")
    ours.add_argument("--top-p", type=float, default=1.0, help="share of the probability drawn from (default: 1)")
    ours.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")


def sampler_of(options: argparse.Namespace) -> "Sampler":
    """Return the sampler that the options of `add_answering` ask for, its generator seeded. Raises UserError."""
    check_positive(options, "max_new_tokens")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed} must be at least 0 and below 2^63.")
    import torch

    from lfq_lightning.packed.sampler import Sampler

    torch.manual_seed(options.seed)
    return Sampler(options.temperature, options.top_p)


def log_to_stderr() -> None:
    """Let the log be seen, beside what the command prints."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("lfq_lightning").setLevel(logging.INFO)
