"""A training step asks the device for no value: on a GPU the host would stand still until all before it is done."""

from itertools import cycle, islice

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lfq_lightning.calibration.activation_cache import ActivationCache
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.plan import Rule
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer
from tests.runs.test_resume import calibrate

_ASK = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique")
LEARNED = [name for name in QUANTIZERS.names() if issubclass(QUANTIZERS.get(name), LearnedQuantizer)]
OBJECTIVE = [name for name in OBJECTIVES.names() if not OBJECTIVES.get(name).__abstractmethods__]
PAIRS = list(islice(zip(cycle(LEARNED), cycle(OBJECTIVE), strict=False), max(len(LEARNED), len(OBJECTIVE))))


class Asked(TorchDispatchMode):
    """Counts operations whose result has values, or a shape, that the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = str(func).startswith(("aten.index.Tensor", "aten.index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or str(func).startswith(_ASK):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchSteps(Callback):
    """Listens from the second step of each block to the last but one: forward, backward, optimizer, logging."""

    def __init__(self) -> None:
        self.asked = Asked()
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.num_training_batches == 1:  # a block with nothing to train
            return
        if batch_idx == 1:
            self.asked.__enter__()
        if batch_idx == trainer.num_training_batches - 1:
            self.asked.__exit__(None, None, None)
            self.steps += batch_idx - 1


@pytest.mark.parametrize(("quantizer", "objective"), PAIRS)
def test_no_step_waits(llama, text_file, tmp_path, monkeypatch, quantizer, objective):
    make = ActivationCache.batch

    def make_on_the_host(cache, indices):
        with _disable_current_modes():
            return make(cache, indices)

    monkeypatch.setattr(ActivationCache, "batch", make_on_the_host)
    rule = Rule("last", {"name": quantizer, "bits": 3, "group_size": 16}, objective=objective, steps=4, batch_size=4)
    watch = WatchSteps()
    calibrate(llama, text_file, tmp_path / "run", watch, rules=[rule], val_check_interval=1.0)
    assert watch.steps == 2
    assert watch.asked.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_no_step_waits_for_a_gpu(llama, text_file, tmp_path, gigabytes):
    """PyTorch tells it, with streams in host memory and on the device."""

    class Forbid(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            watched = 0 < batch_idx < trainer.num_training_batches - 1
            torch.cuda.set_sync_debug_mode("error" if watched else "default")

    rule = Rule("last", {"name": "adaround", "bits": 4}, objective="logit_ce", steps=6, batch_size=4)
    data, gpu = {"device_gb": gigabytes}, {"accelerator": "gpu", "precision": "bf16-mixed", "val_check_interval": 1.0}
    try:
        calibrate(llama, text_file, tmp_path / "run", Forbid(), rules=[rule], data=data, **gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_watch_sees_what_waits():
    values = torch.arange(4.0, requires_grad=True)
    with Asked() as asked:
        values[values > 1].sum().backward()
        float(values.detach()[0])
    assert len(asked.found) == 3
