"""The precision that `auto` chooses, and that whole models follow it: on a CPU of either kind, and on a GPU."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lfq_lightning import precision
from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.load_full_precision import load_full_precision
from lfq_lightning.models.widen import WideLinear
from lfq_lightning.planning.preflight import check_same_precision
from lfq_lightning.trainer import Trainer
from tests.helpers import run, save_tiny


def a_cpu(monkeypatch, fast):
    """Let this CPU be one that is fast in 16 bits, or one that is not."""
    monkeypatch.setattr(precision, "_timed", lambda dtype: (fast, "as the test says"))
    precision.faster_than_fp32.cache_clear()


@pytest.fixture(autouse=True)
def _forget():
    yield
    precision.faster_than_fp32.cache_clear()


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_what_the_cpu_multiplies_fast(monkeypatch, fast, chosen):
    a_cpu(monkeypatch, fast)
    assert precision.choose_precision("auto", "cpu") == chosen
    assert Trainer(accelerator="cpu", logger=False).precision == chosen
    assert precision.choose_precision("16-mixed", "cpu") == "16-mixed"
    half = precision.product_dtype(torch.bfloat16, torch.device("cpu"))
    assert half == (torch.bfloat16 if fast else torch.float32)
    assert precision.product_dtype(torch.float64, torch.device("cpu")) == torch.float64


@pytest.mark.parametrize(("bf16", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_on_a_gpu(monkeypatch, bf16, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: bf16)
    for accelerator in ("auto", "gpu", "cuda"):
        assert precision.choose_precision("auto", accelerator) == chosen
    assert precision.choose_precision("auto", "mps") == "32-true"


def test_the_timing_is_of_both_and_short():
    fast, said = precision._timed(torch.bfloat16)
    assert isinstance(fast, bool) and "bfloat16" in said and "float32" in said
    half, full = precision._product_seconds(torch.bfloat16, 8, 8)
    assert 0 < half < 1 and 0 < full < 1


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_says_what_it_chose_and_keeps_it_elsewhere(config, monkeypatch, caplog, fast):
    caplog.set_level("INFO", "lfq_lightning")
    a_cpu(monkeypatch, fast)
    chosen, other = ("bf16-mixed", "32-true") if fast else ("32-true", "bf16-mixed")
    path = config(trainer={"accelerator": "cpu", "precision": "auto"})
    output = path.parent / "run"
    run(path)
    assert f"precision: {chosen}" in caplog.text
    assert yaml.safe_load((output / "lfq.yaml").read_text())["trainer"]["precision"] == chosen
    lines = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    assert {line["precision"] for line in lines} == {chosen}
    assert f"<td>{chosen}</td>" in (output / "report.html").read_text().replace('<td class="text">', "<td>")
    before = {file.name: file.read_bytes() for file in output.glob("*.safetensors")}
    (output / "config.json").unlink()  # as if it had been killed at its end, and now resumes on another machine
    a_cpu(monkeypatch, not fast)
    run(path)
    assert f"precision: {chosen}, as the run began; by itself this machine would take {other}" in caplog.text
    assert before == {file.name: file.read_bytes() for file in output.glob("*.safetensors")}
    run(path, "--output", str(path.parent / "reused"), "--reuse", str(output))  # keeps what that run had too
    for name, content in before.items():
        assert (path.parent / "reused" / name).read_bytes() == content


def test_processes_must_agree():
    class Ranks:
        size = 3

        def total(self, value):
            return [2.0]

    with pytest.raises(UserError, match="bf16-mixed for 2 of 3 processes"):
        check_same_precision("32-true", Ranks())


@pytest.mark.parametrize("room", [True, False], ids=["in fp32", "kept in 16 bits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_on_a_slow_cpu_computes_as_in_fp32(tmp_path, monkeypatch, room, dtype, tied):
    a_cpu(monkeypatch, fast=False)
    if not room:
        monkeypatch.setattr("lfq_lightning.models.widen.host_bytes", lambda: 0)
    save_tiny(tmp_path, "llama", tied=tied, dtype=dtype)
    model = load_full_precision(open_checkpoint(str(tmp_path)), torch.device("cpu"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    kinds = {type(module) for module in model.modules()}
    assert (WideLinear in kinds) != room
    assert next(model.parameters()).dtype == (torch.float32 if room else dtype)
