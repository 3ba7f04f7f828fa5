"""Run by an environment with gptqmodel: it reads FOLDER, and its torch kernels dequantise every layer.

Prints JSON: the logits of the last of TOKENS (JSON list of ids), computed in fp32 with those weights; the kernels
themselves compute in half precision only.
"""

import json
import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear

folder, tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
layers = {name: module for name, module in model.named_modules() if isinstance(module, TorchLinear)}
assert layers, "no layer was packed"
for name, layer in layers.items():
    weight = layer.dequantize_weight().T.contiguous()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    linear.weight.data = weight
    if layer.bias is not None:
        linear.bias.data = layer.bias
    model.set_submodule(name, linear)
with torch.no_grad():
    logits = model.float()(tokens).logits[0, -1]
print("RESULT " + json.dumps({"logits": logits.tolist(), "layers": len(layers)}))
