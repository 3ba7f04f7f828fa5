"""Packed models for other engines to read: each of a few schemes, in every format that holds it.

    python tests/interop/prepare.py OUTPUT NAME=CHECKPOINT …

Writes OUTPUT/NAME-SCHEME/FORMAT, and OUTPUT/NAME-SCHEME/run, from which they come; what is there is kept. The plain
names `tied`, `untied` and `grids` stand for random tiny models, `untied` with Llama 3.1's rotary scaling, `grids` on
every named grid.
"""

import json
import sys
from pathlib import Path

import torch

from lfq_lightning.cli import main as lfq
from lfq_lightning.errors import UserError
from lfq_lightning.formats import FORMATS
from lfq_lightning.grids import GRIDS
from lfq_lightning.packed.export import export
from lfq_lightning.packed.gguf_export import export_gguf
from tests.helpers import byte_tokenizer, save_tiny

ROOT = Path(__file__).parents[2]
SCHEMES = {f"w{bits}": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 8)} | {
    f"w{bits}-asymmetric": {"bits": bits, "group_size": 32, "symmetric": False} for bits in (2, 3, 4)
}
NAMED = {name: {"grid": name} for name in GRIDS.names()}
TINY = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 512}
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
        if not checkpoint:
            checkpoint = str(output / name)
            if not Path(checkpoint).exists():
                more = {"rope_parameters": LLAMA_3} if name == "untied" else {}
                save_tiny(Path(checkpoint), tied=name != "untied", dtype=torch.float16, **TINY, **more)
                text = (ROOT / "README.md").read_text(encoding="utf-8")
                byte_tokenizer(False).train_new_from_iterator([text], TINY["vocab_size"]).save_pretrained(checkpoint)
        for label, scheme in (NAMED if name == "grids" else SCHEMES).items():
            prepare(output / f"{name}-{label}", checkpoint, scheme)


def prepare(folder: Path, checkpoint: str, scheme: dict[str, object]) -> None:
    """Quantise by rounding to nearest, and export to all formats that hold the scheme."""
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
    for name in [*FORMATS.names(), "gguf"]:
        target = folder / ("model.gguf" if name == "gguf" else name)
        try:
            if not target.exists():
                print(export_gguf(str(run), str(target)) if name == "gguf" else export(str(run), name, str(target)))
        except UserError as error:
            print(f"{folder.name}: {error}")


if __name__ == "__main__":
    main()
