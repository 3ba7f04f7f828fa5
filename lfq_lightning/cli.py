"""The command line: `lfq run | list | generate`, and `lightning run` for the same."""

import argparse
import importlib.util
import sys

from lfq_lightning import __version__
from lfq_lightning.errors import UserError

_HELP = """usage: lfq COMMAND …

  lfq run --config FILE.yaml [--key.path value …]   quantise a model; --print_config prints every key
  lfq list                                          every objective, quantizer and callback with its options
  lfq generate MODEL_DIR "PROMPT"                   let a packed model answer
  lfq --version

`lightning run …` is `lfq run …`. `lfq COMMAND --help` says more."""

_COMMANDS = ("run", "list", "generate")


def main(argv: list[str] | None = None) -> None:
    """Run a command. A UserError is printed as one sentence, with exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(arguments)
    except UserError as error:
        print(f"lfq: error: {error}", file=sys.stderr)
        sys.exit(2)


def lightning_main() -> None:
    """The `lightning` command: `run` is ours, every other word goes to lightning-sdk if that is installed."""
    if sys.argv[1:2] == ["run"]:
        main()
    elif importlib.util.find_spec("lightning_sdk") is not None:
        from lightning_sdk.cli.entrypoint import main_cli

        main_cli()
    else:
        print(f"lightning run comes from lfq_lightning; install lightning-sdk for the rest.\n\n{_HELP}")
        sys.exit(0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_HELP)
    elif arguments[0] == "--version":
        print(f"lfq_lightning {__version__}")
    elif arguments[0] == "run":
        from lfq_lightning.run import run

        run(arguments)
    elif arguments[0] == "list":
        _parser("list", "Print every objective, quantizer and callback.").parse_args(arguments[1:])
        from lfq_lightning.plugin_list import print_plugins

        print_plugins()
    elif arguments[0] == "generate":
        _generate(arguments[1:])
    else:
        from lfq_lightning.registry import did_you_mean

        raise UserError(f"unknown command {arguments[0]!r}: {did_you_mean(arguments[0], _COMMANDS)}")


def _generate(arguments: list[str]) -> None:
    parser = _parser("generate", "Print a packed model's greedy answer.")
    parser.add_argument("model_dir", help="output folder of `lfq run`")
    parser.add_argument("prompt", help="what to say to the model; goes through its chat template if it has one")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="longest answer (default: 100)")
    given = parser.parse_args(arguments)
    if given.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1.")
    from lfq_lightning.load import generate

    print(generate(given.model_dir, given.prompt, given.max_new_tokens))


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"lfq {command}", description=description)
