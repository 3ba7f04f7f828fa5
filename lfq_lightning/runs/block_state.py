"""BlockState: where the training of a block stands, in memory and in a file to resume from."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lfq_lightning.calibration.calibration_block import CalibrationBlock
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError, one_line
from lfq_lightning.runs.fingerprint import digest
from lfq_lightning.write_file import write_tensors

log = logging.getLogger(__name__)

_NOW, _BEST, _OPTIMIZER, _RANDOM = "now.", "best.", "optimizer.", "random"

_FACTS, _CHECKSUM = "state", "sha256"  # keys of the file's metadata
_PROGRESS = ("step", "checked_step", "best_step", "best_loss")


class BlockState:
    """The step a block is at, and the step with the least held-out loss so far with its parameters.

    Args:
        module: the block; on every rank its share of the parameters.
        fingerprint: of the block, so that a file of another one is not taken for its own.
        ranks: who else trains it.
    """

    def __init__(self, module: CalibrationBlock, fingerprint: str, ranks: Ranks) -> None:
        self.module = module
        self.fingerprint = fingerprint
        self.ranks = ranks
        self.step = 0
        self.checked_step = 0
        self.best_step = 0
        self.best_loss = float("inf")
        self.last_loss = float("inf")  # of the last check
        self.best: dict[str, Tensor] = {}

    def keep_if_best(self, loss: float) -> None:
        """Take note of the held-out loss at this step. Raises UserError if it is no number."""
        if not loss < float("inf"):
            plan = self.module.plan
            cure = "lower its lr" if self.step else f"nothing is trained yet, so look into {plan.objective.name}"
            raise UserError(f"block {plan.index}: the held-out loss is {loss} at step {self.step}; {cure}.")
        self.checked_step, self.last_loss = self.step, loss
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.best = {name: parameter.detach().clone() for name, parameter in self._trained()}

    def load_best(self) -> None:
        """Give the module the parameters of its best step."""
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self.best[name])

    def save(self, file: Path, trainer: Trainer, spent: dict[str, float]) -> None:
        """Write all that the rest of the training depends on, whole or not at all; the first rank writes.

        Args:
            spent: what the run has taken so far, to be kept with it.
        """
        optimizer = trainer.strategy.optimizers[0].state_dict()
        tensors: dict[str, Tensor] = {_RANDOM: torch.get_rng_state()}
        tensors |= {_NOW + name: parameter for name, parameter in self._trained()}
        tensors |= {_BEST + name: value for name, value in self.best.items()}
        plain: dict[str, Any] = {}
        for name, value in _leaves(optimizer["state"]):
            if isinstance(value, Tensor):
                tensors[_OPTIMIZER + name] = value
            else:
                plain[name] = value
        facts = {
            "fingerprint": self.fingerprint,
            **{name: vars(self)[name] for name in _PROGRESS},
            "optimizer": {"param_groups": optimizer["param_groups"], "state": plain},
            "schedulers": [config.scheduler.state_dict() for config in trainer.strategy.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "spent": spent,
        }
        whole: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in tensors.items():
            found = self.ranks.gathered(tensor)
            if found is not None:  # bitsandbytes gives all parameters one table; a file wants each its own
                whole[name] = found.clone() if found.data_ptr() in seen else found.contiguous()
                seen.add(found.data_ptr())
        text = json.dumps(facts)
        self.ranks.once(lambda: write_tensors(file, whole, {_FACTS: text, _CHECKSUM: _checksum(whole, text)}))

    def load(self, file: Path, trainer: Trainer) -> None:
        """Resume from a file; its trainer has this block's optimizer already."""
        facts, tensors = _read(file)
        self.step, self.checked_step, self.best_step, self.best_loss = (facts[name] for name in _PROGRESS)
        for name, parameter in self._trained():
            self.best[name] = self.ranks.like(parameter, tensors[_BEST + name])
            with torch.no_grad():
                parameter.copy_(self.ranks.like(parameter, tensors[_NOW + name]))
        parameters = [p for group in trainer.strategy.optimizers[0].param_groups for p in group["params"]]
        leaves: dict[str, Any] = dict(facts["optimizer"]["state"])
        for name, value in tensors.items():
            if name.startswith(_OPTIMIZER):
                name = name.removeprefix(_OPTIMIZER)
                parameter = parameters[int(name.partition(".")[0])]
                leaves[name] = self.ranks.like(parameter, value) if value.shape == parameter.shape else value
        state: dict[int, dict[str, Any]] = {}
        for name, value in leaves.items():
            index, *path, last = name.split(".")
            where = state.setdefault(int(index), {})
            for key in path:
                where = where.setdefault(key, {})
            where[last] = value
        trainer.strategy.optimizers[0].load_state_dict(
            {"state": state, "param_groups": facts["optimizer"]["param_groups"]}
        )
        for config, values in zip(trainer.strategy.lr_scheduler_configs, facts["schedulers"], strict=True):
            config.scheduler.load_state_dict(values)
        trainer.precision_plugin.load_state_dict(facts["precision"])
        torch.set_rng_state(tensors[_RANDOM])

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]


def _leaves(nested: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what an optimizer's state holds, with the path to it; bitsandbytes nests it once more."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", leaf) for name, leaf in _leaves(value))
        else:
            yield str(key), value


def read_facts(file: Path, fingerprint: str) -> dict[str, Any]:
    """Return what a state file of this block says beside its tensors; nothing if it is another's, damaged, or none."""
    try:
        with safe_open(file, "pt") as stored:
            facts = json.loads(stored.metadata()[_FACTS])
        if facts["fingerprint"] != fingerprint:
            return {}
        return _read(file)[0]
    except FileNotFoundError:
        return {}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); the block in it is trained from its start", file, one_line(error)[:100])
        return {}


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return facts and tensors of a state file. Raises ValueError if they are not what was written."""
    with safe_open(file, "pt") as stored:
        metadata, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}
    if metadata[_CHECKSUM] != _checksum(tensors, metadata[_FACTS]):
        raise ValueError("its checksum differs")
    return json.loads(metadata[_FACTS]), tensors


def _checksum(tensors: dict[str, Tensor], facts: str) -> str:
    return digest([tensors[name] for name in sorted(tensors)], facts, *sorted(tensors))
