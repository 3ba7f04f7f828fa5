"""KL on the grids that people run: ours against llama.cpp's own quantisers, and against rounding to nearest.

    npm pack @node-llama-cpp/linux-x64@3.21.1 && tar xzf node-llama-cpp-linux-x64-3.21.1.tgz
    python -m benchmarks.formats --model tiny256=TINY --calibration unseen.txt --other wikitext2-valid.txt \\
        --ggml package/bins/linux-x64/libggml-base.so --work runs/formats

One row of a CSV each; a row that is there is not made again. All methods see the same calibration tokens. llama.cpp's
importance matrix is the mean square of each input over them, as llama-imatrix has it. Where a grid's blocks do not
divide a layer's width, the layer gets the type that llama.cpp falls back to, in ours too; so bytes are equal.
"""

import argparse
import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cpu import cpu_seconds
from benchmarks.quality.__main__ import run_command, split_text
from benchmarks.quality.measure import full_precision, quantised, reference_on
from benchmarks.quality.methods import ANCHORED, NORMALISED
from benchmarks.rows import append, finished
from lfq_lightning.data import CalibrationData
from lfq_lightning.grids import GRIDS, Grid
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.packed.packed_folder import PackedFolder
from lfq_lightning.plan import parse_grid

RESULTS = Path(__file__).parent / "results" / "formats.csv"
FALL_BACK = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
SEQUENCES, SELECTION, LENGTH = 136, 2, 256
INTEGERS = re.compile(r"w(\d)g(\d+)")
PEERS = ("llama.cpp", "llama.cpp imatrix")
OURS: dict[str, dict[str, Any]] = {
    "nearest": {"quantizer": {"name": "rtn", "ratios": 1}},
    "gptq": {"quantizer": {"name": "gptq"}},
    "recipe": {"quantizer": {"name": "adaround", "init": "awq"}, "objective": NORMALISED, "steps": 120},
}
WIDTHS = [2, 3, 4, 5, 6]  # that `METHOD mixed` chooses from, at the bytes of one grid for all; integers only
METHODS = [*PEERS, *OURS, *(f"{name} mixed" for name in OURS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="NAME=CHECKPOINT")
    parser.add_argument("--calibration", type=Path, required=True, help="a .txt; its last part is held out")
    parser.add_argument("--held-out-share", type=float, default=0.1, help="how much of it (0.1)")
    parser.add_argument("--other", type=Path, required=True, help="a .txt of another domain")
    parser.add_argument("--grids", nargs="+", default=GRIDS.names(), help="or w4g64: integers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*PEERS, *OURS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--ggml", help="llama.cpp's libggml-base.so; without it peers are left out")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what lies between")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    name, _, checkpoint = given.model.partition("=")
    calibration, held_out = split_text(given.calibration, given.held_out_share, given.work)
    reference = reference_on(checkpoint, held_out, given.other, LENGTH, texts=False)
    for seed in given.seeds:
        data = {"dataset": str(calibration), "seq_len": LENGTH, "seed": seed}
        data |= {"num_samples": SEQUENCES - SELECTION, "num_held_out": SELECTION}
        for grid in given.grids:
            for method in given.methods:
                cell = {"model": name, "grid": grid, "method": method, "seed": str(seed)}
                if finished(cell, RESULTS):
                    continue
                started = cpu_seconds()
                if method not in PEERS:
                    if not is_ours(grid):
                        continue
                    folder = given.work / "-".join(cell.values())
                    model, bits = ours(checkpoint, grid, method, data, seed, folder)
                elif given.ggml and grid.upper() in gguf.GGMLQuantizationType.__members__:
                    model, bits = theirs(checkpoint, grid, data if "imatrix" in method else None, given.ggml)
                else:
                    continue
                seconds = cpu_seconds() - started
                measured = reference.measure(model)
                row = cell | {"bits": f"{bits:.4f}", "cpu_seconds": f"{seconds:.0f}"}
                names = ("kl", "top1_agreement", "perplexity", "kl_other", "top1_agreement_other")
                append(RESULTS, row | {key: f"{measured[key]:.6g}" for key in names})
                print(*row.values(), f"{measured['kl']:.5f}", f"{measured['kl_other']:.5f}", flush=True)


def grid_for(grid: str, width: int) -> str:
    """Return the grid of a layer: this one, or what llama.cpp falls back to."""
    fits = not is_ours(grid) or parse_grid(keys_of(grid)).divides(width)
    return grid if fits and (grid not in FALL_BACK or width % 256 == 0) else FALL_BACK[grid]


def is_ours(grid: str) -> bool:
    """Tell whether we have a grid, which llama.cpp may not."""
    return grid in GRIDS.names() or INTEGERS.fullmatch(grid) is not None


def keys_of(grid: str) -> dict[str, Any]:
    """Return what YAML says for a grid: w4g64 are asymmetric integers of 4 bits in groups of 64."""
    found = INTEGERS.fullmatch(grid)
    return {"bits": int(found[1]), "group_size": int(found[2]), "symmetric": False} if found else {"grid": grid}


def ours(
    checkpoint: str, grid: str, method: str, data: dict[str, Any], seed: int, folder: Path
) -> tuple[nn.Module, float]:
    """Run `lfq run` on the grid; return the model as it ships, fp32, and its bits per weight of the packed layers."""
    model = full_precision(checkpoint)
    layers = linears(model)
    kinds = {name: grid_for(grid, layer.in_features) for name, layer in layers.items()}
    rule, mixed = OURS[method.removesuffix(" mixed")], method.endswith(" mixed")
    last = f".{model.config.num_hidden_layers - 1}."
    plan = []
    for kind in sorted(set(kinds.values())):
        keys = keys_of(kind) | ({"bits": WIDTHS} if mixed else {})
        rest = {**rule, "quantizer": rule["quantizer"] | keys}
        final = {**rest, "objective": ANCHORED, "steps": 85} if "objective" in rule else rest
        for one, inside in ((final, True), (rest, False)):
            plan.append({**one, "match": [n for n, found in kinds.items() if found == kind and (last in n) == inside]})
    config = {"seed_everything": seed, "model": {"checkpoint": checkpoint}, "data": data, "plan": plan}
    config["trainer"] = {"val_check_interval": 1.0}
    scale_bits = 8 * open_checkpoint(checkpoint).dtype.itemsize
    if mixed:
        alike = {name: parse_grid(keys_of(kind)) for name, kind in kinds.items()}
        config["average_bits"] = average_bits(layers, alike, scale_bits)
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(run_command(config, folder), check=True, stdout=log, stderr=log)
    return quantised(folder), average_bits(layers, PackedFolder(folder).schemes, scale_bits)


def average_bits(layers: dict[str, nn.Linear], grids: dict[str, Grid], scale_bits: int) -> float:
    """Return the bits per weight of layers on these grids."""
    bits = sum(
        g.bits_per_weight(layers[n].in_features, scale_bits) * layers[n].weight.numel() for n, g in grids.items()
    )
    return bits / sum(layer.weight.numel() for layer in layers.values())


def theirs(checkpoint: str, grid: str, data: dict[str, Any] | None, library: str) -> tuple[nn.Module, float]:
    """Quantise by ggml; `data` for an importance matrix."""
    model = full_precision(checkpoint)
    squares = {} if data is None else input_squares(model, checkpoint, data)
    ggml, bits, weights = Ggml(library), 0.0, 0
    for name, layer in linears(model).items():
        kind = grid_for(grid, layer.in_features)
        weight, per_weight = ggml.round_trip(layer.weight.data, kind, squares.get(name))
        layer.weight.data.copy_(weight)
        bits, weights = bits + per_weight * weight.numel(), weights + weight.numel()
    return model, bits / weights


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder's blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


@torch.no_grad()
def input_squares(model: nn.Module, checkpoint: str, data: dict[str, Any]) -> dict[str, Tensor]:
    """Return the mean square of each input of each linear layer over the calibration tokens."""
    tokens, _ = CalibrationData(**data).token_sets(open_checkpoint(checkpoint), torch.device("cpu"))
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears(model).items()]
    for batch in tokens.input_ids.split(8):
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: total / tokens.input_ids.numel() for name, total in sums.items()}


class Ggml:
    """What is needed of libggml-base."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.ggml_row_size.restype = self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        numbers = [ctypes.c_int64] * 3
        self.library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *numbers, ctypes.c_void_p]

    def round_trip(self, weight: Tensor, kind: str, importance: Tensor | None) -> tuple[Tensor, float]:
        """Return the weight (O, I) fp32 as it is after quantising, and bits per weight."""
        rows, columns = weight.shape
        number, source = gguf.GGMLQuantizationType[kind.upper()], np.ascontiguousarray(weight.float().numpy())
        stored = np.zeros(self.library.ggml_row_size(number, columns) * rows, np.uint8)
        back = np.zeros((rows, columns), np.float32)
        by = None if importance is None else np.ascontiguousarray(importance.numpy())
        self.library.ggml_quantize_init(number)
        pointers = source.ctypes.data, stored.ctypes.data
        self.library.ggml_quantize_chunk(number, *pointers, 0, rows, columns, None if by is None else by.ctypes.data)
        read = getattr(self.library, f"dequantize_row_{kind.replace('_k', '_K')}")
        read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        read.restype = None
        read(stored.ctypes.data, back.ctypes.data, rows * columns)
        return torch.from_numpy(back), 8 * stored.size / back.size


if __name__ == "__main__":
    main()
