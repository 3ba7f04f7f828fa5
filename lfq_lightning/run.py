"""`lfq run`: a LightningCLI whose one subcommand quantises a model."""

import contextlib
import logging
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from lfq_lightning.errors import UserError, one_line
from lfq_lightning.registry import did_you_mean, load_plugin_file

warnings.filterwarnings("ignore", message=".*isinstance.treespec.*|.*does not have many workers.*|.*returned `None`.*")
warnings.filterwarnings("ignore", message=".*`configure_optimizers` returned.*|.*smaller than the logging interval.*")
warnings.filterwarnings("ignore", message=".*litlogger.*|.*is not empty.*|.*in eval mode at.*")
warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse")

from jsonargparse import ArgumentError, Namespace  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger  # noqa: E402

from lfq_lightning.calibration.calibration_module import CalibrationModule  # noqa: E402
from lfq_lightning.callbacks import CALLBACKS  # noqa: E402
from lfq_lightning.callbacks.block_scheduler import BlockScheduler  # noqa: E402
from lfq_lightning.callbacks.console import Console  # noqa: E402
from lfq_lightning.callbacks.live_metrics import LiveMetrics  # noqa: E402
from lfq_lightning.callbacks.report import Report  # noqa: E402
from lfq_lightning.data import CalibrationData  # noqa: E402
from lfq_lightning.distributed.ranks import launched_rank  # noqa: E402
from lfq_lightning.file_names import LOGS  # noqa: E402
from lfq_lightning.models.checkpoints import open_checkpoint  # noqa: E402
from lfq_lightning.planning.check_config import check_config  # noqa: E402
from lfq_lightning.planning.chosen_plan import chosen_plan  # noqa: E402
from lfq_lightning.planning.grids_of_file import grids_of_files, names_a_file  # noqa: E402
from lfq_lightning.planning.read_yaml import read_yaml, read_yaml_file  # noqa: E402
from lfq_lightning.precision import choose_precision  # noqa: E402
from lfq_lightning.runs.earlier_run import begun_precision  # noqa: E402
from lfq_lightning.stages import Rule  # noqa: E402
from lfq_lightning.trainer import Trainer  # noqa: E402

log = logging.getLogger(__name__)

_SWITCHES = {"--overwrite"}  # options of `run` that are true when they are named


class CommandLine(LightningCLI):
    """`run` with the keys of the YAML: seed_everything, model, data, plan, trainer, output, …"""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(
            model_class=CalibrationModule,
            datamodule_class=CalibrationData,
            trainer_class=Trainer,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={
                "prog": "lfq",
                "exit_on_error": False,
                "allow_abbrev": False,
                "run": {"exit_on_error": False},
            },
            auto_configure_optimizers=False,
            args=arguments,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"run": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--plan", type=list[Rule], required=True, help="rules; first match wins")
        parser.add_argument("--output", type=str, required=True, help="new folder for the packed model")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace an earlier run in that folder")
        parser.add_argument("--reuse", type=str | None, default=None, help="a run whose first blocks are taken over")
        sized = "bytes of all weights, such as 60MB; each layer gets one of several grids"
        parser.add_argument("--size", type=str | None, default=None, help=sized)
        average = "the same by bits per weight of the layers that the plan quantises"
        parser.add_argument("--average_bits", type=float | None, default=None, help=average)
        parser.add_argument("--save_seconds", type=float, default=300.0, help="how often a block's training is saved")
        parser.add_argument("--plugins", type=list[str] | str, default=[], help="Python files with plugins of your own")
        parser.add_argument("--callbacks", type=list[str | dict[str, Any]], default=[], help="registered callbacks")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            keys = {*self._parser("run").get_defaults().keys()}
            known = {*keys, *(key.partition(".")[0] for key in keys), *(field.name for field in fields(Rule))}
            raise UserError(_with_cure(one_line(error), known)) from error
        if "run" in self.config:
            sections = {"data": CalibrationData, "model": CalibrationModule, "plan": Rule}
            check_config(self.config.run.as_dict(), sections)

    def before_instantiate_classes(self) -> None:
        """Put grids in the place of files and sizes; the YAML that is kept has the plan that came out."""
        if "run" not in self.config:
            return
        config = self.config.run
        rules = [Rule(**vars(rule)) for rule in config.plan]
        from_files, sized = any(map(names_a_file, rules)), config.size is not None or config.average_bits is not None
        if not from_files and not sized:
            return
        if from_files:
            rules = grids_of_files(rules, open_checkpoint(config.model.checkpoint))
        if sized:
            rules = chosen_plan(config, rules)
        config.plan = [Namespace(vars(rule)) for rule in rules]
        config.size = config.average_bits = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config: Namespace = self.config_init.run
        trainer = self.config.run.trainer  # what is chosen here stands in the YAML that is kept
        begun = begun_precision(config.output, config.overwrite, config.reuse)
        trainer.precision = choose_precision(trainer.precision, trainer.accelerator, begun)
        kwargs["precision"] = trainer.precision
        resolved = self._parser("run").dump(self.config.run, skip_none=False)
        scheduler = BlockScheduler(
            config.plan, config.output, config.overwrite, config.reuse, config.save_seconds, resolved
        )
        lightnings = config.trainer.callbacks or []
        foreign = [CALLBACKS.parse(value) for value in config.callbacks]
        for plugin in foreign:
            if issubclass(plugin.cls, (BlockScheduler, Console, Report, LiveMetrics)):
                raise UserError(f"callbacks: {plugin.name} is always there; remove it.")
        kwargs["callbacks"] = [
            scheduler,
            Console(),
            Report(),
            LiveMetrics(),
            *(p.build() for p in foreign),
            *(lightnings if isinstance(lightnings, list) else [lightnings]),
        ]
        kwargs["logger"] = _loggers(config.trainer.logger, config.output)
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"trainer: {one_line(error)}") from error


def run(arguments: list[str]) -> None:
    """Parse `run …` and run it. Raises UserError for every mistake of the user."""
    level = logging.INFO if launched_rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    for name in ("httpx", "lightning.fabric.utilities.seed", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    arguments = with_underscores(arguments)
    _load_plugins(arguments)
    try:
        CommandLine(arguments)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {one_line(error)}") from error


class _ReadError(Exception):
    """Leaves the command line when the config is read and checked, before anything is made of it."""


class _ConfigReader(CommandLine):
    def before_instantiate_classes(self) -> None:
        raise _ReadError


def read_config(arguments: list[str]) -> Namespace:
    """Return the checked config that `run …` would use. Raises UserError for every mistake in it."""
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    arguments = with_underscores(arguments)
    _load_plugins(arguments)
    reader = _ConfigReader.__new__(_ConfigReader)
    with contextlib.suppress(_ReadError):
        reader.__init__(arguments)  # type: ignore[misc]
    return reader.config.run


def with_underscores(arguments: list[str]) -> list[str]:
    """Return arguments as jsonargparse has them: `--save-seconds 9 --overwrite` is `--save_seconds 9 --overwrite true`.

    The YAML's spelling, with underscores, works too, with a hint.
    """
    spelled = []
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not option.startswith("--"):
            spelled.append(argument)
            continue
        if "_" in option:
            log.warning("on the command line %s is written %s", option, option.replace("_", "-"))
        name = f"--{option[2:].replace('-', '_')}"
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        spelled.append(f"{name}{equals}{value}")
        if name in _SWITCHES and not equals and following.startswith("--"):
            spelled.append("true")
    return spelled


def _loggers(setting: Any, output: str) -> Any:
    """Return the loggers asked for, and the one that writes metrics.csv; `logger: false` is none at all."""
    if setting is False:
        return False
    asked = setting if isinstance(setting, list) else [setting] if isinstance(setting, Logger) else []
    if launched_rank() == 0:
        _keep_earlier(Path(output).expanduser() / LOGS / "metrics.csv")
    csv = [] if any(isinstance(logger, CSVLogger) for logger in asked) else [CSVLogger(output, name=LOGS, version="")]
    return [*asked, *csv]


def _keep_earlier(file: Path) -> None:
    """Rename the metrics of a run that now resumes: Lightning would remove them."""
    if file.is_file():
        number = 1 + len(list(file.parent.glob("metrics-*.csv")))
        file.rename(file.with_name(f"metrics-{number}.csv"))


def _load_plugins(arguments: list[str]) -> None:
    """Load the files of `plugins:` before parsing, so that their names are known; found from here or by the YAML."""
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in {"--config", "-c", "--plugins"} and not value:
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
        if option in {"--config", "-c"} and Path(value).is_file():
            content = read_yaml_file(Path(value))
            named = content.get("plugins") if isinstance(content, dict) else None
            beside = Path(value).parent
        elif option == "--plugins":
            named, beside = read_yaml(value, "--plugins"), Path()
        else:
            continue
        if isinstance(named, str):
            named = [named]
        if not isinstance(named, list | None) or not all(isinstance(file, str) for file in named or []):
            raise UserError(f"plugins: {named!r} is not a list of Python files; write `plugins: [my_objective.py]`.")
        for file in named or []:
            load_plugin_file(Path(file) if Path(file).is_file() else beside / file)


def _with_cure(message: str, known: set[str]) -> str:
    """Add the nearest key to jsonargparse's report of an unknown one."""
    unknown = re.search(r"[Oo]ption '([\w.]+)'|[Kk]ey '([\w.]+)' is not|arguments: --([\w.]+)", message)
    if unknown is None:
        return message
    word = next(group for group in unknown.groups() if group)
    near = did_you_mean(word, known)
    return f"{message.rstrip('.')}; {near}" if near.startswith("did") else message
