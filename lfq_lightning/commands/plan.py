"""`lfq plan --config FILE.yaml [--model MODEL] [--gpus 8x80GB]`: memory, disk, work and time of a run; no weights."""

import sys

from lfq_lightning.commands.command_line import parser


def main(arguments: list[str]) -> None:
    """Run the command; exit code 1 if the run does not fit."""
    ours = parser("plan", "Print what a run will hold, write and compute, and whether it fits; needs no weights.")
    ours.add_argument("--config", required=True, help="the run's YAML; more of its keys may follow, as for `lfq run`")
    ours.add_argument("--model", help="another model: a folder, a config.json, or a hub id")
    ours.add_argument("--gpus", help="GPUs of each node, as 8x80GB; this machine's GPU, or CPU, if not given")
    ours.add_argument("--nodes", type=int, default=1, help="how many nodes (1)")
    ours.add_argument("--tflops", type=float, help="bf16 TFLOP/s that each GPU sustains")
    options, keys = ours.parse_known_args(arguments)
    from lfq_lightning.planning.plan_run import parse_machine, plan_config, print_plan
    from lfq_lightning.run import read_config

    named = ["--model.checkpoint", options.model] if options.model else []
    config = read_config(["run", "--config", options.config, *keys, *named, "--output", "planned"])
    trainer = config.trainer
    machine = parse_machine(
        options.gpus, options.nodes, options.tflops, trainer.precision, trainer.accelerator, trainer.devices
    )
    if not print_plan(config.model.checkpoint, plan_config(config, machine), machine):
        sys.exit(1)
