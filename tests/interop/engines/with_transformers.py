"""Run by another environment: transformers and compressed-tensors read FOLDER. Prints JSON.

Weights as digests, log-probabilities of TOKENS (JSON list of ids), and greedy continuation.
"""

import hashlib
import importlib.util
import json
import sys

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

assert importlib.util.find_spec("lfq_lightning") is None, "lfq_lightning is installed here"
folder, tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
weights = {
    name: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
    for name, value in model.state_dict().items()
}
with torch.no_grad():
    greedy = model.generate(tokens, do_sample=False, max_new_tokens=40, pad_token_id=0)[0, tokens.shape[1] :].tolist()
    logprobs = model.float()(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()
print("RESULT " + json.dumps({"weights": weights, "greedy": greedy, "logprobs": logprobs}))
