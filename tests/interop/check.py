"""Do other engines read what we write? One row per folder and engine; exit code 1 if a check fails.

    python -m tests.interop.check PREPARED --transformers PYTHON --gptqmodel PYTHON --vllm PYTHON --llama-cpp FOLDER

PREPARED comes from prepare.py; each engine lives in an environment of its own (Makefile: interop), llama.cpp
in a FOLDER where npm has put node-llama-cpp.
The reference are our own weights as they ship, computed in fp32.

- transformers: weights bit-equal, the same greedy tokens.
- gptqmodel: logits within 1e-4 of ours (relative, fp32).
- vLLM (in fp16: its 4-bit kernels know no fp32): the mean difference of log-probabilities over the licence's text is at
  most that of the same model in bf16 in transformers.
- MLX: mean difference of log-probabilities, beside bf16's.
- llama.cpp rounds activations to 8 bits: mean difference of log-probabilities, beside bf16's; it also has to cut the
  text into the same tokens.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lfq_lightning.packed.load_model import load

ENGINES = Path(__file__).parent / "engines"
TEXT = "Once upon a time there was a little girl who lived in a small house near the forest. She loved to walk there."
LONG = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
WINDOW = 200  # tokens of LONG at a time
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}
LLAMA_CPP_BOUND = 0.05, 5.0  # nats, or times bf16's difference: activations are rounded to 8 bits there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    for engine in ("transformers", "gptqmodel", "vllm", "mlx", "llama-cpp"):
        parser.add_argument(f"--{engine}")
    given = parser.parse_args()
    failed = 0
    for model in sorted(path.parent for path in given.prepared.glob("*/run")):
        for engine, what, measured, good in checks(model, given):
            failed += not good
            print(f"{model.name:24} {engine:14} {what:18} {measured:44} {'ok' if good else 'FAILED'}", flush=True)
    sys.exit(1 if failed else 0)


def checks(model: Path, given: argparse.Namespace) -> Iterator[tuple[str, str, str, bool]]:
    """Yield (engine, format, what was measured, whether it is good) for all that applies to one prepared model."""
    ours = Reference(model / "run")
    if given.transformers and (model / "compressed_tensors").exists():
        script = ENGINES / "with_transformers.py"
        found = run([given.transformers, "-I", script, model / "compressed_tensors", ours.ids])
        equal = sum(found["weights"][name] == digest for name, digest in ours.digests.items())
        same = found["greedy"] == ours.greedy
        measured = f"{equal} of {len(ours.digests)} weights equal, greedy {'same' if same else 'differs'}"
        yield "transformers", "compressed_tensors", measured, equal == len(ours.digests) and same
    for name in ("gptq", "gptq_v2"):
        if given.gptqmodel and (model / name).exists():
            found = run([given.gptqmodel, ENGINES / "with_gptqmodel.py", model / name, ours.ids])
            same_folder = load(model / name, dequantize=True)[0].float()  # fp16 scales, so other roundings than bf16's
            with torch.no_grad():
                logits = same_folder(torch.tensor([ours.tokens])).logits[0, -1]
            error = float((torch.tensor(found["logits"]) - logits).norm() / logits.norm())
            yield "gptqmodel", name, f"logits differ by {error:.1e}", error <= 1e-4
    for name in ("compressed_tensors", "awq", "gptq"):
        scheme = model.name.partition("-")[2]
        readable = scheme == "w4" or (scheme == "w4-asymmetric" and name != "gptq")
        if given.vllm and readable and (model / name).exists():
            found = run([given.vllm, ENGINES / "with_vllm.py", model / name, json.dumps(ours.windows)], VLLM)
            wanted, bound = ours.long
            error = _distance(torch.tensor(found["logprobs"]), wanted)
            yield "vLLM", name, f"mean |Δ log p| {error:.4f}, bf16 {bound:.4f}", error <= bound
    if given.mlx and (model / "mlx").exists():
        found = run([given.mlx, ENGINES / "with_mlx.py", model / "mlx", json.dumps(ours.windows)])
        wanted, bound = ours.long
        error = _distance(torch.tensor(found["logprobs"]), wanted)
        yield "MLX", "mlx", f"mean |Δ log p| {error:.4f}, bf16 {bound:.4f}", error <= 2 * bound
    if given.llama_cpp and (model / "model.gguf").exists():
        script = Path(given.llama_cpp) / "with_llama_cpp.mjs"
        script.write_text((ENGINES / "with_llama_cpp.mjs").read_text())
        found = run(["node", script, model / "model.gguf", TEXT])
        same = found["tokens"] == ours.plain_tokens
        wanted, bf16 = ours.logprobs([ours.plain_tokens])
        error = _distance(torch.tensor([found["logprobs"]]), wanted) if same else float("nan")
        theirs, own = (float(each.mean().neg().exp()) for each in (torch.tensor(found["logprobs"]), wanted))
        measured = (
            f"tokens {'same' if same else 'differ'}, mean |Δ log p| {error:.4f}, bf16 {bf16:.4f}; "
            f"PPL {theirs:.4g}, ours {own:.4g}"
        )
        yield "llama.cpp", "gguf", measured, same and error <= max(LLAMA_CPP_BOUND[0], LLAMA_CPP_BOUND[1] * bf16)


class Reference:
    """What our own weights give, dense, as they ship."""

    def __init__(self, run_folder: Path) -> None:
        model, tokenizer = load(run_folder, dequantize=True)
        for parameter in model.parameters():  # as it ships, where this CPU computes in fp32 too
            parameter.data = parameter.data.to(model.config.dtype)  # rotary tables stay in fp32
        self.tokens = tokenizer(TEXT)["input_ids"][:100]
        self.plain_tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        self.ids = json.dumps(self.tokens)
        long = tokenizer(LONG)["input_ids"]
        self.windows = [long[i : i + WINDOW] for i in range(0, len(long) - WINDOW + 1, WINDOW)]
        self.digests = {
            name: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            for name, value in model.state_dict().items()
        }
        tokens = torch.tensor([self.tokens])
        with torch.no_grad():
            self.greedy = model.generate(tokens, do_sample=False, max_new_tokens=40, pad_token_id=0)[
                0, tokens.shape[1] :
            ].tolist()
        self.folder, self.half = run_folder, model.bfloat16()

    @cached_property
    def full(self) -> PreTrainedModel:
        return load(self.folder, dequantize=True)[0].float()

    def logprobs(self, sequences: list[list[int]]) -> tuple[torch.Tensor, float]:
        """Return ours in fp32 (sequences, tokens - 1), and how far the same model in bf16 is from them."""
        ours = _logprobs(self.full, sequences)
        return ours, _distance(_logprobs(self.half, sequences), ours)

    @cached_property
    def long(self) -> tuple[torch.Tensor, float]:
        return self.logprobs(self.windows)


def _logprobs(model: PreTrainedModel, sequences: list[list[int]]) -> torch.Tensor:
    """Return the log-probability of each token but the first, (sequences, tokens - 1), fp32 nats."""
    tokens = torch.tensor(sequences)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]


def _distance(logprobs: torch.Tensor, ours: torch.Tensor) -> float:
    return float((logprobs - ours).abs().mean())


def run(command: list[Any], extra: dict[str, str] | None = None) -> dict[str, Any]:
    """Run an engine's script and return what it printed after RESULT."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(extra or {})})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{' '.join(words)[:200]} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
