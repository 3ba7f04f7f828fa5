"""Packed folders of every scheme, read back by transformers with compressed-tensors: bit-equal weights."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from lfq_lightning.cli import main
from lfq_lightning.packed.load_model import load
from tests.helpers import save_tiny


def quantizer(bits, group_size, symmetric=True):
    return {"name": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric}


PLANS = {
    **{f"w{bits}g16": [{"match": "all", "quantizer": quantizer(bits, 16)}] for bits in (2, 3, 4, 8)},
    "w3 per channel": [{"match": "all", "quantizer": quantizer(3, -1)}],
    "w3g16 asymmetric": [{"match": "all", "quantizer": quantizer(3, 16, symmetric=False)}],
    "w4 per channel asymmetric": [{"match": "all", "quantizer": quantizer(4, -1, symmetric=False)}],
    "mixed": [
        {"match": "*.down_proj", "quantizer": quantizer(8, 48)},
        {"match": 1, "quantizer": quantizer(4, -1)},
        {"match": "model.layers.0.*", "quantizer": quantizer(2, 8)},
    ],
    "a head": [
        {"match": "head", "quantizer": quantizer(8, 16)},
        {"match": "all", "quantizer": quantizer(4, 16)},
    ],
    "nvfp4": [{"match": "all", "quantizer": {"name": "rtn", "grid": "nvfp4"}}],
    "mxfp4": [
        {"match": "*.down_proj", "quantizer": "fp"},
        {"match": "all", "quantizer": {"name": "gptq", "grid": "mxfp4"}},
    ],
    "integers, nvfp4 and mxfp4": [
        {"match": "*.down_proj", "quantizer": {"name": "rtn", "grid": "nvfp4"}},
        {"match": 1, "quantizer": {"name": "rtn", "grid": "mxfp4"}},
        {"match": "all", "quantizer": quantizer(4, 16)},
    ],
}


@pytest.mark.parametrize("plan", PLANS)
def test_same_weights(plan, config, tmp_path):
    asymmetric, floating = "asymmetric" in plan, "fp4" in plan
    model = save_tiny(tmp_path / "model", tied=plan != "a head", dtype=torch.bfloat16 if floating else torch.float32)
    main(["run", "--config", str(config(plan=PLANS[plan], model={"checkpoint": str(model)}))])
    ours, _ = load(tmp_path / "run", dequantize=True)
    settings: dict[str, Any] = {}
    if asymmetric:
        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run", **settings)
    if floating:  # compressed-tensors makes these bf16 whatever the model is in
        for parameter in ours.parameters():
            parameter.data = parameter.data.bfloat16()
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)
    weights = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, weights[name]), name
