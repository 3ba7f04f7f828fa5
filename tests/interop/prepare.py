"""Packed models for other engines to read: each of a few schemes, in every format that holds it.

    python tests/interop/prepare.py OUTPUT NAME=CHECKPOINT …

Writes OUTPUT/NAME-SCHEME/FORMAT, and OUTPUT/NAME-SCHEME/run, from which they come; what is there is kept. The plain
names `tied`, `untied` and `grids` stand for random tiny models, `untied` with Llama 3.1's rotary scaling, `grids` on
every named grid. `like=LLAMA_CPP` makes models of more architectures, converted by llama.cpp's own converter in that
folder (see convert.py), and puts ours into its files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from lfq_lightning.cli import main as lfq
from lfq_lightning.errors import UserError
from lfq_lightning.formats import FORMATS
from lfq_lightning.grids import GRIDS
from lfq_lightning.packed.export import export
from lfq_lightning.packed.gguf_export import export_gguf
from lfq_lightning.packed.gguf_like import export_like
from tests.helpers import byte_tokenizer, save_tiny

ROOT = Path(__file__).parents[2]
SCHEMES = {f"w{bits}": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 8)} | {
    f"w{bits}-asymmetric": {"bits": bits, "group_size": 32, "symmetric": False} for bits in (2, 3, 4)
}
NAMED = {name: {"grid": name} for name in GRIDS.names()}
TINY = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 512}
# where the random models of tests.helpers are not what llama.cpp takes for granted of real ones
LIKE: dict[str, dict[str, object]] = {
    "gemma2": {},
    "gemma3_text": {"layer_types": ["sliding_attention"] * 3, "query_pre_attn_scalar": TINY["head_dim"]},
    "phi3": {},
    "granite": {},
    "cohere": {},
    "starcoder2": {},
    "mixtral": {},
    "qwen3_moe": {},
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def main() -> None:
    output = Path(sys.argv[1])
    for word in sys.argv[2:]:
        name, _, checkpoint = word.partition("=")
        if name == "like":
            for family, more in LIKE.items():
                prepare_like(output / f"like-{family}", family, more, checkpoint)
            continue
        if not checkpoint:
            checkpoint = str(output / name)
            if not Path(checkpoint).exists():
                more = {"rope_parameters": LLAMA_3} if name == "untied" else {}
                save_random(Path(checkpoint), "llama", name != "untied", torch.float16, more)
        for label, scheme in (NAMED if name == "grids" else SCHEMES).items():
            prepare(output / f"{name}-{label}", checkpoint, scheme)


def save_random(folder: Path, family: str, tied: bool, dtype: torch.dtype, more: dict[str, object]) -> None:
    """Save a tiny random model with a tokenizer trained on the README."""
    save_tiny(folder, family, tied=tied, dtype=dtype, **{**TINY, **more})
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    byte_tokenizer(False).train_new_from_iterator([text], TINY["vocab_size"]).save_pretrained(folder)


def prepare_like(folder: Path, family: str, more: dict[str, object], llama_cpp: str) -> None:
    """Quantise a tiny model of a family and write it into what llama.cpp's converter makes of it."""
    checkpoint, converted, target = folder / "model", folder / "bf16.gguf", folder / "model.gguf"
    if target.exists():
        return
    if not checkpoint.exists():
        save_random(checkpoint, family, True, torch.bfloat16, more)
    quantise(folder, str(checkpoint), {"grid": "q5_0"})
    command = [sys.executable, str(Path(__file__).parent / "convert.py"), str(checkpoint), str(converted)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": f"{llama_cpp}:{llama_cpp}/gguf-py"})
    print(export_like(str(folder / "run"), str(target), str(converted)))


def quantise(folder: Path, checkpoint: str, scheme: dict[str, object]) -> Path:
    """Quantise by rounding to nearest into `folder`/run, unless that is there."""
    run = folder / "run"
    if not (run / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "text.txt"
        text.write_text(
            (ROOT / "README.md").read_text(encoding="utf-8").replace("\n\n", "<|endoftext|>"), encoding="utf-8"
        )
        config = {
            "seed_everything": 1,
            "model": {"checkpoint": checkpoint},
            "data": {"dataset": str(text), "num_samples": 3, "num_held_out": 1, "seq_len": 64},
            "plan": [{"match": "all", "quantizer": {"name": "rtn", **scheme}}],
            "trainer": {"accelerator": "cpu", "precision": "32-true"},
            "output": str(run),
        }
        (folder / "config.json").write_text(json.dumps(config))
        lfq(["run", "--config", str(folder / "config.json"), "--overwrite", "true"])
    return run


def prepare(folder: Path, checkpoint: str, scheme: dict[str, object]) -> None:
    """Quantise by rounding to nearest, and export to all formats that hold the scheme."""
    run = quantise(folder, checkpoint, scheme)
    for name in [*FORMATS.names(), "gguf"]:
        target = folder / ("model.gguf" if name == "gguf" else name)
        try:
            if not target.exists():
                print(export_gguf(str(run), str(target)) if name == "gguf" else export(str(run), name, str(target)))
        except UserError as error:
            print(f"{folder.name}: {error}")


if __name__ == "__main__":
    main()
