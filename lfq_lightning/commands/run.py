"""`lfq run --config FILE.yaml [--key.path value …]`: quantise a model; --print-config prints every key."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    from lfq_lightning.run import run

    run(["run", *arguments])
