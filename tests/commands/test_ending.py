"""How commands end: signals, closed pipes, plain terminals, and errors that nobody foresaw."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lfq_lightning.commands import ending
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import StoppedError, UserError
from lfq_lightning.runs.saving import Saving
from tests.helpers import FLEXROUND, GPTQ, fails, run

RTN = [{"match": "all", "quantizer": {"name": "rtn", "bits": 4, "group_size": 16}}]
LFQ = [str(Path(sys.executable).with_name("lfq"))]


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(1)


def process(*arguments, **options):
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [*LFQ, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_each_signal_ends_a_run_with_its_code(number, code, cpu_ranks):
    before = signal.signal(number, signal.SIG_DFL)  # who starts the tests in the background ignores some
    saving = Saving(0.0)
    saving.listen(cpu_ranks, None)
    try:
        saving.stop_at_once = False
        os.kill(os.getpid(), number)
        assert saving.stopping()
        with pytest.raises(
            StoppedError, match=rf"stopped by {number.name} at here; run the same command again"
        ) as caught:
            saving.stop("here")
        assert caught.value.exit_code == code
        saving.stop_at_once = True
        with pytest.raises(StoppedError, match="a point with nothing to save"):
            send(number)
        saving.unlisten()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        saving.unlisten()
        signal.signal(number, before)


@pytest.fixture
def cpu_ranks():
    import torch

    return Ranks(torch.device("cpu"))


def test_nohup_is_respected(cpu_ranks):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    saving = Saving(0.0)
    try:
        saving.listen(cpu_ranks, None)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not saving.stopping() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        saving.unlisten()
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_saves_and_the_run_resumes_to_the_same_bytes(config, tmp_path):
    plan = [{"match": "all", "quantizer": FLEXROUND, "steps": 40, "batch_size": 4}]
    run(config(plan=plan))
    path = config(plan=plan, output=str(tmp_path / "stopped"), save_seconds=0)
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    running = process("run", "--config", path, preexec_fn=default)
    for line in running.stdout:
        if b"block 1/3" in line:
            running.send_signal(signal.SIGINT)
            break
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and b"stopped by SIGINT" in err and b"Traceback" not in err
    run(path)
    for file in (tmp_path / "run").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes()


def test_time_and_peak_of_a_resumed_run_are_those_of_all_its_parts(config, tmp_path):
    import json

    from lfq_lightning.packed.seal import sealed, unsealed

    run(config(plan=RTN))
    output = tmp_path / "run"
    lines = [unsealed(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    assert lines[0]["spent"]["seconds"] < lines[-1]["spent"]["seconds"]
    for line in lines:
        line["spent"] = {"seconds": 1000.0 + line["index"], "peak_bytes": 10**12}
    (output / "journal.jsonl").write_text("".join(json.dumps(sealed(line)) + "\n" for line in lines))
    (output / "config.json").unlink()
    run(config(plan=RTN))
    metrics = unsealed((output / "metrics.json").read_text())
    assert 1001.0 < metrics["seconds"] < 1100.0 and metrics["peak_bytes"] == 10**12


# ---- the terminal ----------------------------------------------------------------------------------------------------


def test_a_closed_pipe_is_quiet_and_the_run_ends_well(config, tmp_path):
    path = config(plan=RTN)
    read, write = os.pipe()
    running = subprocess.Popen([*LFQ, "run", "--config", str(path)], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 0 and (tmp_path / "run" / "config.json").exists()
    assert b"Traceback" not in err and b"Logging error" not in err and b"BrokenPipe" not in err


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_a_terminal_of_ascii(config):
    path = config(plan=RTN)
    path.write_text(f"# naïve\n{path.read_text()}", encoding="utf-8")
    for command in (["list"], ["run", "--config", path, "--print_config"]):
        running = process(*command, env=ASCII)
        out, err = running.communicate(timeout=120)
        assert running.returncode == 0, err
        assert len(out) > 100


# ---- errors ----------------------------------------------------------------------------------------------------------


def raises(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("mend it."), 2, "lfq: error: mend it."),
        (KeyboardInterrupt(), 130, "lfq: error: interrupted"),
        (OSError(28, "x", "/some/file"), 2, "/some/file: No space left on device; free some space"),
        (ZeroDivisionError("by\nzero"), 70, "ZeroDivisionError: by zero; nobody foresaw that: its trace is in "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_is_raised_becomes_a_sentence(capsys, tmp_path, monkeypatch, error, code, said):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(SystemExit) as caught:
        ending.run_to_its_end(raises(error))
    err = capsys.readouterr().err
    assert caught.value.code == code and said in err and "Traceback" not in err and len(err.splitlines()) == 1
    traces = list(tmp_path.glob("lfq-error-*.txt"))
    assert len(traces) == (code == 70)
    for trace in traces:
        assert "ZeroDivisionError" in trace.read_text() and str(trace) in err


@pytest.mark.parametrize(
    "text", ["1 / 0", "import sys; sys.exit(0)", "raise SystemExit", "import nothing_of_this_name"]
)
def test_a_plugin_that_raises_or_leaves(config, capsys, tmp_path, text):
    file = tmp_path / f"my_plugin_{abs(hash(text))}.py"
    file.write_text(text)
    message = fails(capsys, "run", "--config", str(config(plan=RTN)), "--plugins", f"[{file}]")
    assert file.name in message and "cannot be imported" in message


@pytest.mark.parametrize("name", ["ModelPruning", "StochasticWeightAveraging", "BatchSizeFinder", "LearningRateFinder"])
def test_lightnings_callbacks_of_one_model_are_refused(config, capsys, name):
    arguments = {"ModelPruning": {"pruning_fn": "l1_unstructured"}, "StochasticWeightAveraging": {"swa_lrs": 0.1}}
    entry = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments.get(name, {})}
    path = config(plan=[{"match": "all", "quantizer": GPTQ}], trainer={"accelerator": "cpu", "callbacks": [entry]})
    assert f"trainer.callbacks: {name} works on one model's parameters" in fails(capsys, "run", "--config", str(path))


def test_sensitivity_refuses_a_folder_at_once(llama, text_file, tmp_path, capsys):
    message = fails(
        capsys, "sensitivity", str(llama), "--dataset", str(text_file), "--average-bits", "3", "--output", str(tmp_path)
    )
    assert "is a folder; give a file" in message
