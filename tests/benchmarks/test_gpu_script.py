"""The script for a card, as far as it goes without one: every step on something small, and how it spends its time."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def script(tmp_path, *arguments, python=sys.executable):
    environment = os.environ | {"PYTHON": str(python), "WORK": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def rows():
    files = (ROOT / "benchmarks" / "results" / f"{name}.csv" for name in ("kernels", "decode", "calibrate_8b", "sweep"))
    return {file: file.read_bytes() for file in files if file.exists()}


def test_dry_run(tmp_path):
    before = rows()
    done = script(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("== ") == 5 and "failed" not in done.stdout
    for sign in ("floor on an H200", "W4g128 static:", "cpu recipe", "W4 1x4096x4096", "wrong: none"):
        assert sign in done.stdout
    assert rows() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["decode", "calibrate_8b", "kernels.sweep"])
def test_refuses_without_a_gpu(module, tmp_path, monkeypatch, capsys):
    options = ["--work", str(tmp_path)] if module == "calibrate_8b" else []
    monkeypatch.setattr(sys, "argv", [module, *options])
    with pytest.raises(SystemExit) as ended:
        import_module(f"benchmarks.{module}").main()
    said = f"benchmarks.{module} needs a CUDA GPU; --dry-run goes without one."
    assert said in (ended.value.code, capsys.readouterr().err.strip())  # sys.exit(text) prints it and exits with 1


def test_a_step_that_fails_is_told_and_the_next_one_begins(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$@" >> "$WORK/said"\n[ "$2" != benchmarks.decode ]\n')
    python.chmod(0o755)
    done = script(tmp_path, "100", python=python)
    assert done.returncode == 1 and "== decoding failed" in done.stdout
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == 6  # the decoder's tests, and five steps
    assert said[1] == (
        "-m benchmarks.kernels --only fake_quant soft_round bitstream gptq_solve linear_soft_ce --seconds 25"
    )
    assert said[-1] == "-m benchmarks.kernels.sweep --seconds 15"


def test_no_step_begins_when_the_time_is_over(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\n")
    python.chmod(0o755)
    done = script(tmp_path, "10", python=python)
    assert done.returncode == 0 and done.stdout.count("no time left") == 5
