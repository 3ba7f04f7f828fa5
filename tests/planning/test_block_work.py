"""The work that `lfq plan` makes a time of, against operations counted in a run."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_llama import save_random_llama
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import Plan, Rule
from lfq_lightning.planning.block_work import block_work
from lfq_lightning.planning.memory_estimate import Setting
from tests.helpers import ROOT
from tests.runs.test_resume import calibrate


class Counted(TorchDispatchMode):
    """FLOP of products, and the bytes of what all other operations take and give, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.flop, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::bmm"):
            self.flop += 2 * args[0].numel() * args[1].shape[-1]
        elif not func.is_view and func._schema.name != "aten::detach":
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result


class CountSteps(Callback):
    """Counts the steps of the block that is trained, but for the first."""

    def __init__(self) -> None:
        self.counted, self.on = Counted(), False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.on = batch_idx > 0
        if self.on:
            self.counted.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.on:
            self.counted.__exit__(None, None, None)


@pytest.mark.parametrize("quantizer", ["adaround", "flexround", "omniquant"])
def test_a_step_takes_what_is_counted(tmp_path, quantizer):
    steps, batch_size, length = 5, 4, 64
    save_random_llama(tmp_path / "model", blocks=1, hidden=256, intermediate=704, words=512)
    (tmp_path / "text.txt").write_text((ROOT / "LICENSE").read_text() * 3)
    count, options = CountSteps(), {"name": quantizer, "bits": 3, "group_size": 32, "init": "rtn"}
    rules = [Rule("all", options, steps=number, batch_size=batch_size) for number in (steps, 1)]
    data = {"num_samples": 8, "seq_len": length, "num_held_out": 2}
    settings = {"data": data, "val_check_interval": 1.0}
    calibrate(tmp_path / "model", tmp_path / "text.txt", tmp_path / "run", count, rules=rules[:1], **settings)
    skeleton = ModelSkeleton(open_checkpoint(str(tmp_path / "model")))
    setting = Setting(1, False, samples=8, held_out=2, seq_len=length, compute_bytes=4, stream_bytes=4)
    many, one = (block_work(Plan([rule]).resolve(skeleton)[0], skeleton, setting) for rule in rules)
    first = sum(2 * o * i for name, (o, i) in skeleton.linear_shapes(0).items() if name.split("_proj")[0][-1] in "qkv")
    unneeded = (steps - 1) * batch_size * length * first  # gradients of what enters the block
    assert count.counted.flop == many.flop - one.flop - unneeded
    assert count.counted.bytes == pytest.approx(many.bytes - one.bytes, rel=0.2)


def test_what_runs_again_in_the_backward_pass_counts_again(llama):
    rules = [Rule("all", "flexround", activation_checkpointing=again) for again in (False, True)]
    skeleton = ModelSkeleton(open_checkpoint(str(llama)))
    setting = Setting(1, False, samples=8, held_out=2, seq_len=16, compute_bytes=4, stream_bytes=4)
    once, twice = (block_work(Plan([rule]).resolve(skeleton)[0], skeleton, setting) for rule in rules)
    weights = sum(o * i for o, i in skeleton.linear_shapes(0).values())
    assert twice.flop - once.flop == 2 * weights * 200 * 8 * 16
    assert once.seconds(1e9, 1e6) == pytest.approx(once.flop / 1e9 + once.bytes / 1e6)
    assert torch.tensor([once.bytes, twice.bytes]).diff().item() > 0
