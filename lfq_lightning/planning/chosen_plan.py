"""The plan that a run with a size takes, chosen once and kept beside its output."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace

from lfq_lightning.data import CalibrationData
from lfq_lightning.distributed.ranks import launched_rank
from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.planning.choose_grids import choose_grids, parse_size
from lfq_lightning.stages import Rule
from lfq_lightning.token_set import TokenSet
from lfq_lightning.write_file import write_text

log = logging.getLogger(__name__)

_OBSERVED, _MEASURED, _TOKENS = 24, 4, 128  # sequences that GPTQ sees, that KL is measured on, and their length


def chosen_plan(config: Namespace, rules: list[Rule]) -> list[Rule]:
    """Return the rules for the size that the config of a run asks for; a later start of the same run finds them again.

    Raises UserError.
    """
    size = None if config.size is None else parse_size(config.size)
    file = Path(f"{Path(config.output).expanduser()}.plan.yaml")
    data: dict[str, Any] = config.data.as_dict()
    asked = json.dumps([config.model.as_dict(), data, [vars(rule) for rule in rules], size, config.average_bits])
    mark = f"# chosen for {hashlib.sha256(asked.encode()).hexdigest()}"
    if file.is_file() and (text := file.read_text(encoding="utf-8")).startswith(mark):
        log.info("plan: %s, which an earlier start has chosen", file)
        return [Rule(**rule) for rule in yaml.safe_load(text)["plan"]]
    checkpoint = open_checkpoint(config.model.checkpoint)
    small = {"num_samples": min(_OBSERVED, data["num_samples"]), "seq_len": min(_TOKENS, data["seq_len"])}
    small["num_held_out"] = 2 * _MEASURED
    source = CalibrationData(**{**data, **small})
    source.check(checkpoint)
    observed, others = source.token_sets(checkpoint, torch.device("cpu"))
    one, other = map(TokenSet, others.input_ids.split(_MEASURED), others.mask.split(_MEASURED))
    found = choose_grids(rules, checkpoint, observed, (one, other), size, config.average_bits)
    if launched_rank() == 0:
        listed = yaml.safe_dump({"plan": [_short(rule) for rule in found]}, sort_keys=False, width=120)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, f"{mark}\n{listed}")
        except OSError as error:
            raise UserError(f"output: {file} cannot be written ({error.strerror}); give another output.") from error
        log.info("plan: %s", file)
    return found


def _short(rule: Rule) -> dict[str, Any]:
    """Return a rule without what is left to defaults."""
    usual = vars(Rule("", ""))
    return {key: value for key, value in vars(rule).items() if key in ("match", "quantizer") or value != usual[key]}
