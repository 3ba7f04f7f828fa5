"""Measure one type: quantise it, load the result, compare."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CompressedTensorsConfig

import lfq_lightning
from benchmarks.families.tiny_model import auto_class, save_tiny_model
from lfq_lightning.calibration.find_folds import find_folds
from lfq_lightning.cli import main as lfq
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.coverage import coverage
from lfq_lightning.models.model_skeleton import ModelSkeleton

COLUMNS = ["type", "verdict", "packable", "folds", "awq_8_bits_kl", "loaded_apart", "streamed_apart", "kept", "reason"]
_IDS = torch.arange(3, 35)[None]
_LOADED, _STREAMED = 1e-2, 1e-3  # standard deviations of the logits that two of them may be apart
_FLEXROUND = {"name": "flexround", "bits": 4, "group_size": 32, "init": "gptq"}
_GPTQ = {"name": "gptq", "bits": 4, "group_size": 32}
_PLANS = {
    "lfq": [
        {"match": "last", "quantizer": _FLEXROUND, "objective": "logit_ce", "steps": 5},
        {"match": "all", "quantizer": _GPTQ},
    ],
    "awq": [{"match": "all", "quantizer": {"name": "awq", "bits": 8, "group_size": 32}}],
}


def measure(model_type: str, folder: Path) -> dict[str, object]:
    """Return a row of the table; `folder` is for its files."""
    model = folder / "model"
    try:
        save_tiny_model(model_type, model)
    except Exception as error:
        return {"verdict": "not built", "reason": _one_line(error)}
    try:
        if (reason := _quantise(model, folder, "lfq")) is not None:
            return {"verdict": "refused", "reason": reason.replace(str(model), model_type)}
        row = _found(model) | {"streamed_apart": _streamed_apart(model_type, model, folder / "fp32")}
        if (reason := _quantise(model, folder, "awq")) is None:
            metrics = json.loads((folder / "awq" / "metrics.json").read_text())
            row["awq_8_bits_kl"] = f"{metrics['quantized']['held_out']['kl']:.2g}"
    except Exception as error:
        return {"verdict": "trace", "reason": _one_line(error)}
    try:
        row["loaded_apart"] = _loaded_apart(model_type, folder / "lfq")
    except Exception as error:
        return row | {"verdict": "not loaded", "reason": _one_line(error)}
    right = row["loaded_apart"] <= _LOADED and row["streamed_apart"] <= _STREAMED
    return row | {"verdict": "runs" if right else "differs"}


def _quantise(model: Path, folder: Path, plan: str) -> str | None:
    """Run a plan; return the sentence of a refusal."""
    text = folder / "text.txt"
    text.write_text("<|endoftext|>".join(f"{i} bottles of beer on wall {i}; " * (2 + i % 3) for i in range(40)))
    config = folder / f"{plan}.yaml"
    settings = {
        "seed_everything": 1,
        "model": {"checkpoint": str(model)},
        "data": {"dataset": str(text), "num_samples": 8, "seq_len": 32, "num_held_out": 4},
        "plan": _PLANS[plan],
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "output": str(folder / plan),
    }
    config.write_text(json.dumps(settings))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            lfq(["run", "--config", str(config)])
    except SystemExit as end:
        if end.code not in (0, None):
            said = [line for line in errors.getvalue().splitlines() if line.startswith("lfq: error: ")]
            return said[-1].removeprefix("lfq: error: ") if said else "no sentence"
    return None


@torch.no_grad()
def _found(model: Path) -> dict[str, Any]:
    skeleton = ModelSkeleton(open_checkpoint(str(model)))
    covered = coverage(skeleton)
    embedded, folds = skeleton.embed(_IDS).float(), set()
    for index in range(len(skeleton)):
        block = skeleton.block(range(index, index + 1))
        folds |= {fold.source.rpartition(".")[2] for fold in find_folds(block, embedded)}
        embedded = block(embedded)
    kept = ", ".join(name.partition("*.")[2] for name in covered.large)
    return {"packable": f"{covered.share:.3f}", "folds": len(folds), "kept": kept}


@torch.no_grad()
def _loaded_apart(model_type: str, folder: Path) -> float:
    """Compare what plain transformers loads, packed and dequantised, with what `load` does; fp32."""
    auto = auto_class(model_type)
    packed = auto.from_pretrained(folder).eval()(input_ids=_IDS).logits
    theirs = auto.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    ours, _ = lfq_lightning.load(folder, dequantize=True)
    first, second = (each.eval().float()(input_ids=_IDS).logits for each in (theirs, ours))
    return _apart(first, second) if packed.isfinite().all() else float("nan")


@torch.no_grad()
def _streamed_apart(model_type: str, model: Path, copy: Path) -> float:
    """Compare the logits of streamed blocks with the model's own, on two sequences; fp32."""
    ids = torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    own = auto_class(model_type).from_pretrained(model, dtype=torch.float32).eval()
    own.save_pretrained(copy)  # tables are made in the dtype of the config
    return _apart(lfq_lightning.streamed_logits(copy, ids), own(input_ids=ids).logits)


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return round(float((first - second).abs().max() / second.std()), 6)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
