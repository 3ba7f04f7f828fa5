"""Load a folder in mlx-lm; print the log-probability of each token but the first of some sequences."""

import json
import sys

import mlx.core as mx
from mlx_lm import load

model, _ = load(sys.argv[1])
sequences = mx.array(json.loads(sys.argv[2]))
logprobs = []
for row in sequences:
    logits = model(row[None])[0, :-1].astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    logprobs.append(mx.take_along_axis(logits, row[1:, None], axis=-1)[:, 0].tolist())
print("RESULT " + json.dumps({"logprobs": logprobs}))
