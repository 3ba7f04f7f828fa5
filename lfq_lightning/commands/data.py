"""`lfq data --config FILE.yaml`: what its calibration data look like, before anything is calibrated on them."""

from lfq_lightning.commands.command_line import log_to_stderr, parser


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("data", "Make a run's calibration data and print what they look like.")
    ours.add_argument("--config", required=True, help="the run's YAML; more of its keys may follow, as for `lfq run`")
    ours.add_argument("--examples", type=int, default=3, help="sequences to print (3)")
    options, keys = ours.parse_known_args(arguments)
    from lfq_lightning.data import CalibrationData
    from lfq_lightning.data.data_report import print_data
    from lfq_lightning.ops.path import best_device
    from lfq_lightning.run import read_config

    log_to_stderr()
    config = read_config(["run", "--config", options.config, *keys, "--output", "planned"])
    data = CalibrationData(**config.data.as_dict())
    print_data(config.model.checkpoint, data, best_device(), options.examples)
