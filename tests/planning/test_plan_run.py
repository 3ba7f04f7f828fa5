"""`lfq plan`: within 15 % of what a real run holds; from a config alone; and clear about what does not fit."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.random_llama import save_random_llama
from lfq_lightning.cli import main
from lfq_lightning.data import CalibrationData
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.checkpoints.shape_checkpoint import ShapeCheckpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.peak_memory import host_bytes
from lfq_lightning.plan import Rule
from lfq_lightning.planning import plan_run as planning
from lfq_lightning.planning.plan_run import Machine, parse_machine, plan_run
from lfq_lightning.precision import choose_precision
from tests.helpers import ROOT, thorough_but

GRID = {"bits": 4, "group_size": 64}
FLEXROUND = {"name": "flexround", **GRID, "offset": True}
TRAINING = {"steps": 2, "batch_size": 2}
PLANS = {
    "flexround": ([{"match": "all", "quantizer": FLEXROUND, **TRAINING}], "32-true"),
    "gptq and lfq": (
        [
            {"match": "last", "quantizer": {**FLEXROUND, "init": "awq"}, "objective": "logit_ce", **TRAINING},
            {"match": "all", "quantizer": {"name": "gptq", **GRID}},
        ],
        choose_precision("auto", "cpu"),  # bf16 takes minutes where this CPU has no instructions for it
    ),
}
PROGRAM = """
import json, sys
from lfq_lightning.cli import main
from lfq_lightning.planning.plan_run import parse_machine, plan_config
from lfq_lightning.run import read_config
config = read_config(["run", "--config", sys.argv[1]])
planned = plan_config(config, parse_machine(None, 1, 1.0, config.trainer.precision, "cpu"))
main(["run", "--config", sys.argv[1]])
print(json.dumps({"memory": planned.cpu_peak, "output": planned.output}))
"""


@pytest.mark.parametrize("name", thorough_but("gptq and lfq", PLANS))
def test_memory_and_disk_as_planned(tmp_path, name):
    save_random_llama(tmp_path / "model", blocks=2, hidden=1024, intermediate=2816, words=4096)
    (tmp_path / "text.txt").write_text((ROOT / "LICENSE").read_text() * 3)
    plan, precision = PLANS[name]
    content = {
        "model": {"checkpoint": str(tmp_path / "model")},
        "data": {"dataset": str(tmp_path / "text.txt"), "num_samples": 8, "seq_len": 128, "num_held_out": 2},
        "plan": plan,
        "trainer": {"accelerator": "cpu", "precision": precision, "logger": False},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    planned = json.loads(said.splitlines()[-1])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert planned["memory"] == pytest.approx(metrics["peak_bytes"], rel=0.15)
    assert planned["output"] == pytest.approx(metrics["model_bytes"], rel=0.02)


SMALL = ["plan", "--config", str(ROOT / "configs" / "flexround-lfq-w4.yaml")]
LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"


def test_large_models_from_their_shapes(capsys):
    skeleton = ModelSkeleton(ShapeCheckpoint(LLAMA_70B))
    per_block = sum(o * i for o, i in skeleton.linear_shapes(0).values())
    assert len(skeleton) == 80 and per_block == 855_638_016
    assert ModelSkeleton(ShapeCheckpoint(LLAMA_8B)).checkpoint.dtype == torch.bfloat16
    main([*SMALL, "--model", LLAMA_8B, "--gpus", "1x24GB"])
    assert "it fits" in capsys.readouterr().out
    preset = str(ROOT / "configs" / "llama-3.1-70b-w4-fsdp2.yaml")
    main(["plan", "--config", preset, "--gpus", "80 gb"])
    one = capsys.readouterr().out
    main(["plan", "--config", preset, "--gpus", "8x80GB", "--nodes", "2"])
    sixteen = capsys.readouterr().out
    assert "1 process(es)" in one and "16 process(es)" in sixteen
    assert "0 … 78  flexround  mse" in sixteen


def test_a_gpu_that_is_here_is_planned_for_unless_the_run_is_on_the_cpu(monkeypatch):
    monkeypatch.setattr(planning, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(planning, "_measured_rate", lambda precision, device: {"cuda": 5e14, "cpu": 1e11}[device.type])
    monkeypatch.setattr(planning, "_measured_bandwidth", lambda device: {"cuda": 2e12, "cpu": 1e10}[device.type])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    assert parse_machine(None, 1, None, "auto") == Machine(
        1, 1, 80 * 10**9, True, 5e14, 2e12, "measured here", here=True
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    counts = [
        parse_machine(None, 1, 300, "auto", "gpu", devices).devices for devices in (None, [3, 5], "auto", -1, 4, "2")
    ]
    assert counts == [1, 2, 8, 8, 4, 2]
    assert parse_machine(None, 1, 300, "auto", "gpu") == Machine(
        1, 1, 80 * 10**9, True, 3e14, 2e12, "stated", here=True
    )
    here = parse_machine(None, 1, None, "auto", "cpu")
    assert here == Machine(1, 1, host_bytes(), False, 1e11, 1e10, "measured here", here=True)


def test_what_does_not_fit_or_cannot_be(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--model", LLAMA_70B, "--gpus", "80GB"])
    assert ended.value.code == 1
    assert "the whole model cannot write its own calibration data here; give data.dataset" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("any")
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--model", LLAMA_70B, "--gpus", "24GB", "--data.dataset", str(text)])
    assert ended.value.code == 1
    assert "it does not fit: training is the largest; try activation_checkpointing: true" in capsys.readouterr().out
    for arguments, message in [
        (["--model", LLAMA_8B, "--gpus", "eight"], "'eight' is not understood; write the number and memory"),
        (["--model", LLAMA_8B, "--gpus", "3x80GB"], "do not divide among 3 processes"),
        (["--model", LLAMA_8B, "--nodes", "0"], "--nodes: 0 must be at least 1"),
        (["--model", LLAMA_8B, "--tflops", "-1"], "--tflops: -1.0 must be positive"),
        (["--model", str(tmp_path)], "is no folder with a config.json"),
        (["--model", LLAMA_8B, "--data.seq_len", "no"], "data.seq_len"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([*SMALL, *arguments])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_the_whole_is_planned_for(llama, text_file):
    """It costs training and no solving, adds no bytes to the result, and is named."""
    blocks = [Rule("all", {"name": "gptq", "bits": 3, "group_size": 16, "correct": 1.0})]
    whole = Rule("whole", "scales", objective="logit_ce", steps=10, batch_size=4)
    data = CalibrationData(str(text_file), num_samples=8, seq_len=32, num_held_out=4)
    machine = Machine(1, 1, 10**11, False, 1e12, 1e10, "stated")
    without, with_it = (plan_run(str(llama), rules, data, "32-true", machine) for rules in (blocks, [*blocks, whole]))
    (added,) = set(with_it.blocks) - set(without.blocks)
    assert added.startswith("the whole model  scales")
    assert with_it.blocks[added].train > max(block.peak for block in without.blocks.values())
    assert with_it.output == without.output
    skeleton = ModelSkeleton(open_checkpoint(str(llama)))
    weights = sum(o * i for index in range(len(skeleton)) for o, i in skeleton.linear_shapes(index).values())
    trained = 6 * weights * whole.steps * whole.batch_size * data.seq_len
    assert trained < with_it.work.flop - without.work.flop < 3 * trained
