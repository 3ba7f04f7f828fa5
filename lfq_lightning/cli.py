"""The command line: `lfq COMMAND …`, and `lightning run` for `lfq run`. Each command is a file in commands/."""

import importlib
import importlib.util
import sys
from pathlib import Path

from lfq_lightning import __version__
from lfq_lightning.commands.ending import prepare_streams, run_to_its_end, use_utf8
from lfq_lightning.errors import UserError

_COMMANDS = Path(__file__).parent / "commands"
_MARK = "`lfq "  # how the docstring of a command begins; the other files there help them
_COLUMN = 50


def main(argv: list[str] | None = None) -> None:
    """Run a command. What goes wrong is printed as one sentence, with an exit code."""
    if argv is None:
        use_utf8(sys.argv[1:])
        prepare_streams()
    run_to_its_end(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def lightning_main() -> None:
    """The `lightning` command: `run` is ours, every other word goes to lightning-sdk if that is installed."""
    if sys.argv[1:2] == ["run"]:
        main()
    elif importlib.util.find_spec("lightning_sdk") is not None:
        from lightning_sdk.cli.entrypoint import main_cli

        main_cli()
    else:
        print(f"lightning run comes from lfq_lightning; install lightning-sdk for the rest.\n\n{usage()}")
        sys.exit(0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2)


def commands() -> dict[str, str]:
    """Return every command with the first line of its docstring; imports none of them."""
    first = {file.stem: file.read_text(encoding="utf-8").partition("\n")[0] for file in sorted(_COMMANDS.glob("*.py"))}
    lines = {name: line.strip('"') for name, line in first.items()}
    return {name: line for name, line in lines.items() if line.startswith(_MARK)}


def usage() -> str:
    """Return what `lfq --help` prints."""
    rows = []
    for line in commands().values():
        call, _, what = line.removeprefix("`").partition("`: ")
        rows.append(f"  {call:{_COLUMN}}  {what}" if len(call) <= _COLUMN else f"  {call}\n  {'':{_COLUMN}}  {what}")
    listed = "\n".join(rows)
    return f"usage: lfq COMMAND …\n\n{listed}\n\n`lightning run …` is `lfq run …`. `lfq COMMAND --help` says more."


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(usage())
    elif arguments[0] == "--version":
        print(f"lfq_lightning {__version__}")
    elif arguments[0] in commands():
        importlib.import_module(f"lfq_lightning.commands.{arguments[0]}").main(arguments[1:])
    else:
        from lfq_lightning.registry import did_you_mean

        raise UserError(f"unknown command {arguments[0]!r}: {did_you_mean(arguments[0], commands())}")
