"""The kernels' benchmark as far as it goes without a GPU: its list, its refusal, and that each side runs."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels import cases
from benchmarks.kernels.__main__ import TESTS, passed
from benchmarks.rows import ROOT


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks.kernels", *options], capture_output=True, text=True)


def test_dry_run_lists_every_case():
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases.CASES) > 60
    w4 = next(line for line in lines if "W4 1x28672x8192" in line)
    assert "0.1249 GB" in w4 and "26.0 µs, by bytes" in w4  # half a byte a weight, 4 a group; 4.8 TB/s


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu():
    done = run()
    assert done.returncode == 1
    assert done.stderr.strip() == "benchmarks.kernels needs a CUDA GPU; --dry-run lists the cases without one."


def test_a_green_operation_is_one_whose_tests_ran_and_passed(tmp_path):
    for file in TESTS.values():
        assert (ROOT / "tests" / "ops" / file).is_file()  # JUnit names a class by the path of its module

    def green(*outcomes):
        cases = "".join(f'<testcase classname="tests.ops.test_bitstream">{inner}</testcase>' for inner in outcomes)
        (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        return passed(str(tmp_path / "report.xml"), "bitstream")

    assert green("") and green("", "<skipped/>")
    assert not green() and not green("<skipped/>")
    assert not green("", "<failure/>") and not green("", "<error/>")


@pytest.mark.parametrize(
    ("make", "sides"),
    [
        (lambda: cases._fake_quant(3, 256, False, True), ("triton", "reference")),
        (lambda: cases._fake_quant(3, 256, True, False), ("triton",)),
        (lambda: cases._soft_round(3, 256, False), ("triton",)),
        (lambda: cases._soft_round(3, 256, True), ("triton",)),
        (lambda: cases._linear_soft_ce(5, 8, 50), ("triton", "two bare products")),
        (lambda: cases._gptq("o", 8, 128), ("triton",)),
        (lambda: cases._packed_matmul(2, 64, 256, 3), ("triton", "cublas bf16")),
        (lambda: cases._bitstream(3, 64, 3, True), ("triton",)),
    ],
)
def test_sides_run(make, sides, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(cases, "GPU", "cpu")  # where operations are the reference, or the interpreter's
    monkeypatch.setattr(cases, "ROTATED_BYTES", 0)
    made = make().sides()
    for name in sides:
        side = made[name]()
        assert len(side.buffers) == 1
        side.run(*side.buffers[0])
