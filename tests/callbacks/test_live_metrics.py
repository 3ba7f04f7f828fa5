"""What loggers see, and the alarms."""

import csv
import logging
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.loggers import Logger

from lfq_lightning.callbacks.block_callback import BlockReport
from lfq_lightning.callbacks.live_metrics import LiveMetrics
from tests.helpers import run

TRAINER = SimpleNamespace(loggers=[], is_global_zero=True, global_step=0)


def report(index, kl, before=1.0, last=0.5):
    return BlockReport(
        index=index,
        name=f"model.layers.{index}",
        objective="mse",
        quantizers=["rtn"],
        loss_before=before,
        loss_after=min(before, last),
        loss_last=last,
        best_step=0,
        kl_before=kl,
        kl_after=kl,
        cache_error={},
        seconds=1.0,
        peak_bytes=1,
        weights={},
        eta_seconds=0.0,
    )


def test_the_csv_has_all_columns_whatever_other_loggers_there_are(config, tmp_path):
    run(config(trainer={"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1}))
    with (tmp_path / "run" / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = {name for row in rows for name, value in row.items() if value}
    assert {"train/loss", "train/grad_norm", "train/lr", "held_out/loss", "block/kl_after"} <= columns
    blocks = [row for row in rows if row["block/index"]]
    assert [float(row["block/index"]) for row in blocks] == [0.0, 1.0, 2.0]
    assert len([row for row in rows if row["train/lr"]]) == 8  # a cosine from the plan's rate
    norms = [float(row["train/grad_norm"]) for row in rows if row["train/grad_norm"]]
    assert len(norms) == 8 and all(norm > 0 for norm in norms)


@pytest.mark.parametrize("listed", [True, False])
def test_csv_stays_beside_a_logger_of_ones_own(config, tmp_path, listed):
    own = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "mine")}}
    other = {"class_path": "tests.callbacks.test_live_metrics.Kept", "init_args": {"save_dir": str(tmp_path / "kept")}}
    path = config(trainer={"accelerator": "cpu", "precision": "32-true", "logger": [other] if listed else own})
    run(path)
    assert (tmp_path / "run" / "logs" / "metrics.csv").is_file() == listed
    if listed:
        assert {"block/kl_after", "held_out/loss"} <= Kept.seen
    else:
        assert list((tmp_path / "mine").rglob("metrics.csv"))


class Kept(Logger):
    """Stands for the logger of another service."""

    seen: ClassVar[set[str]] = set()
    name, version = "kept", 0

    def __init__(self, save_dir: str) -> None:
        super().__init__()

    def log_metrics(self, metrics, step=None):
        Kept.seen |= set(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_an_alarm_for_a_jump_and_for_training_that_harms(caplog):
    callback = LiveMetrics()
    with caplog.at_level(logging.WARNING):
        for index, kl in enumerate([0.01, 0.015, 0.02, 0.03]):
            callback.on_block_end(TRAINER, report(index, kl))
        assert caplog.messages == []
        callback.on_block_end(TRAINER, report(4, 0.2))
        callback.on_block_end(TRAINER, report(5, 0.21, before=1.0, last=1.5))
    jump, harm = caplog.messages
    assert jump.startswith("block 4: the KL jumped from 0.0300 to 0.2000, 6.7 times")
    assert harm.startswith("block 5: training took the held-out mse from 1 to 1.5; what ships is step 0")


def test_gradient_norm_is_that_of_all_parameters():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([4.0, 0.0])
    logged = {}
    module = SimpleNamespace(log=lambda name, value, sync_dist: logged.update({name: float(value)}))
    trainer = SimpleNamespace(loggers=[1], global_step=9, log_every_n_steps=10)
    LiveMetrics().on_before_optimizer_step(trainer, module, torch.optim.SGD(parameters, lr=0.25))
    assert logged == {"train/grad_norm": 5.0, "train/lr": 0.25}
