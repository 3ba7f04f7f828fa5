"""Where kernels run, a user's commands send every operation to its kernel, and results are those of the reference."""

import importlib
import json
import sys
from collections import Counter

import pytest
import torch

from lfq_lightning.cli import main
from lfq_lightning.packed.generate import Writer, answer
from lfq_lightning.packed.load_model import load
from tests.helpers import save_tiny

GRID = {"bits": 4, "group_size": 32}
PLAN = [
    {"match": "last", "quantizer": {"name": "flexround", "bits": 3, "group_size": 32, "init": "gptq"}},
    {"match": 0, "quantizer": {"name": "adaround", **GRID}, "steps": 4, "batch_size": 2},
]
PLAN[0] |= {"objective": "logit_ce", "steps": 4, "batch_size": 2}


KITS = ("fake_quant", "soft_round", "linear_soft_ce", "gptq_solve", "packed_matmul")


def send(monkeypatch: pytest.MonkeyPatch, to_kernels: bool, launched: Counter[str]) -> None:
    """Decide where operations run, and count the kernels that are launched by their kit."""
    for kit in KITS:
        module = importlib.import_module(f"lfq_lightning.ops.{kit}.triton")

        def count(*arguments, kit=kit, launch=module.launch, **options):
            launched[kit] += 1
            return launch(*arguments, **options)

        monkeypatch.setattr(module, "launch", count)
    for name, module in list(sys.modules.items()):
        if name.startswith("lfq_lightning") and hasattr(module, "runs_triton"):
            monkeypatch.setattr(module, "runs_triton", lambda device: to_kernels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU that is not there")
def test_run_and_generate_by_kernels(text_file, tmp_path, monkeypatch):
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
    model = save_tiny(tmp_path / "model", dtype=torch.float16, **shape)
    found, answers, launched = {}, {}, {"kernels": Counter(), "reference": Counter()}
    for way in launched:
        config = {
            "seed_everything": 1,
            "model": {"checkpoint": str(model)},
            "data": {"dataset": str(text_file), "num_samples": 6, "num_held_out": 2, "seq_len": 32},
            "plan": PLAN,
            "trainer": {"accelerator": "cpu", "precision": "32-true", "logger": False},
            "output": str(tmp_path / way),
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        with monkeypatch.context() as patched:
            send(patched, way == "kernels", launched[way])
            main(["run", "--config", str(tmp_path / "config.json")])
            loaded, tokenizer = load(tmp_path / "kernels")
            answers[way] = answer(Writer(loaded), tokenizer, [{"role": "user", "content": "hello"}], 2)
        found[way] = json.loads((tmp_path / way / "metrics.json").read_text())["held_out"]
    assert set(launched["kernels"]) == set(KITS)
    assert not launched["reference"]
    assert found["kernels"] == pytest.approx(found["reference"], rel=1e-3)
    assert answers["kernels"] == answers["reference"]
