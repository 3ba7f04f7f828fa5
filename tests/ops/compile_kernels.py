"""Compile every kernel in every configuration for GPUs that are not here, and say what came out.

    python -m tests.ops.compile_kernels [--every]

Without `--every`, one of those that differ in little: kernels without matrix products for sm_80, which has less shared
memory than sm_90 and as many registers; of packed products by turns fp16 for sm_90, bf16 for sm_80. One line per case:
registers and shared memory as the assembler reports them, how many instructions stand in loops, how many of these touch
spilled registers, and which matrix instructions the code has. Runs without TRITON_INTERPRET; test_compiled_kernels.py
starts it and judges, and does so for all with `--thorough`.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lfq_lightning.ops.bitstream import triton as bitstream
from lfq_lightning.ops.fake_quant import triton as fake_quant
from lfq_lightning.ops.gptq_solve import triton as gptq_solve
from lfq_lightning.ops.linear_soft_ce import triton as linear_soft_ce
from lfq_lightning.ops.packed_matmul import triton as packed_matmul
from lfq_lightning.ops.soft_round import triton as soft_round

ARCHITECTURES = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """A kernel with its arguments: each a Triton type, or a constant where the kernel wants one."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int = 3
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a case: registers of a thread, bytes of shared memory."""

    name: str
    architecture: int
    registers: int
    instructions_in_loops: int
    spills_in_loops: int
    shared: int
    matrix_instructions: list[str]


def cases() -> Iterator[Case]:
    """Yield every configuration that the wrappers can launch, one per distinct program."""
    kinds = {
        "plain": (),
        "flexround": ("DIVIDES",),
        "flexround offset": ("DIVIDES", "OFFSETS"),
        "signround": ("OFFSETS",),
        "block_ap": ("SHIFTS",),
    }
    for kind, terms in kinds.items():
        flags = {flag: flag in terms for flag in ("DIVIDES", "OFFSETS", "SHIFTS")}
        pointers = {
            "latent scale zero": "*fp32",
            "log_divisor row_log_divisor": "*fp32" if flags["DIVIDES"] else None,
            "offset": "*fp32" if flags["OFFSETS"] else None,
            "shift unit": "*fp32" if flags["SHIFTS"] else None,
        }
        for k in (32, 128, 4096):
            rows, columns = fake_quant.tile_of(k)
            tile = {"ROWS": rows, "COLUMNS": columns}
            sizes = {"R": "i32", "K": "i32", "G": "i32", "max_code": "i32"}
            warps = fake_quant.WARPS
            for out in ("bf16", "u8"):
                forward = {**pointers, "out": f"*{out}", **sizes, **flags, "CODES": out == "u8", **tile}
                yield Case(f"fake_quant {kind} {k} {out}", fake_quant.forward_kernel, _spread(forward), warps)
            rows, columns = fake_quant.tile_of(k, backward=True)
            tile = {"ROWS": rows, "COLUMNS": columns}
            given = {"grad": "*bf16", "by_scale by_zero by_group by_log by_offset by_shift": "*fp32"}
            backward = {**pointers, **given, **sizes, **flags, **tile}
            yield Case(f"fake_quant backward {kind} {k}", fake_quant.backward_kernel, _spread(backward), warps)
    for k in (32, 128, 4096):
        tensors, sizes = {"position scale low zero": "*fp32"}, {"R K": "i32", "sharpness": "fp32", "max_code": "i32"}
        rows, columns = fake_quant.tile_of(k)
        forward = {**tensors, "out": "*bf16", **sizes, "ROWS": rows, "COLUMNS": columns}
        yield Case(f"soft_round {k}", soft_round.forward_kernel, _spread(forward), fake_quant.WARPS)
        rows, columns = fake_quant.tile_of(k, backward=True)
        given = {**tensors, "grad": "*bf16", "by_position by_scale": "*fp32", **sizes}
        backward = {**given, "ROWS": rows, "COLUMNS": columns}
        yield Case(f"soft_round backward {k}", soft_round.backward_kernel, _spread(backward), fake_quant.WARPS)
    for width in (1024, linear_soft_ce.CHUNK_VOCABULARY):
        for p in ("bf16", "fp32"):
            given = {"logits": "*fp32", "p": f"*{p}", "peak total shrink": "*fp32", "vocabulary": "i32", "WIDTH": width}
            warps = linear_soft_ce.warps_of(width)
            yield Case(f"soften {width} {p}", linear_soft_ce.soften_kernel, _spread(given), warps)
    for width in (16, gptq_solve.SPAN):
        tensors = {"work factor scale zero codes latent errors": "*fp32", "columns rows max_code": "i32"}
        given = {**tensors, "WIDTH": width, "ROWS": gptq_solve.ROWS}
        yield Case(f"gptq {width}", gptq_solve.round_span_kernel, _spread(given), gptq_solve.WARPS)
    for bits in range(2, 9):
        sizes = {"rows columns width": "i32", "BITS": bits, "RUNS": bitstream.RUNS}
        yield Case(f"pack {bits}", bitstream.pack_kernel, _spread({"codes": "*u8", "words": "*i32", **sizes}), 4)
        yield Case(f"unpack {bits}", bitstream.unpack_kernel, _spread({"words": "*i32", "codes": "*u8", **sizes}), 4)
    for bits in packed_matmul.WIDTHS:
        for dtype, short in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
            # inputs that fill no whole tile are masked
            for m, group, even, architectures in (
                (1, 128, True, ARCHITECTURES),
                (1, 32, False, ARCHITECTURES),
                (16, 128, True, ARCHITECTURES),
                (32, 128, False, ARCHITECTURES),
                (64, 128, True, (80,)),
                (64, 128, True, (90,)),
                (128, 128, False, (80,)),
                (128, 128, False, (90,)),
                (256, 128, False, (90,)),  # on sm_80 that of 128
            ):
                block = packed_matmul.block_of(m, bits, large=architectures == (90,))
                words = packed_matmul.words_per_tile(bits, group, 4096, 4096 // group)
                constants = packed_matmul.constants(bits, words, group, even, dtype, block, assembly=True)
                tensors = {"x": f"*{short}", "words grid": "*i32", "out": f"*{short}", "parts": "*fp32"}
                sizes = {"arrivals": "*i32", "M N K G tiles": "i32", "table": "*i32"}
                given = {**tensors, **sizes, **constants}
                name = f"packed_matmul {bits} bits {short} m{m} g{group}"
                yield Case(name, block.kernel, _spread(given), block.warps, block.stages, architectures)


def jobs(every: bool) -> list[tuple[int, int]]:
    """Return which cases, by their number, are compiled for which architecture."""
    pairs = [(index, case, architecture) for index, case in enumerate(cases()) for architecture in case.architectures]
    if every:
        return [(index, architecture) for index, _, architecture in pairs]
    kinds: dict[str, list[tuple[int, int]]] = {}
    for index, case, architecture in pairs:
        kinds.setdefault(case.name.replace("bf16", "fp16"), []).append((index, architecture))
    newest, oldest = (lambda job: (job[1], -job[0])), (lambda job: (-job[1], job[0]))
    chosen = []
    for number, (kind, alike) in enumerate(kinds.items()):
        if "packed_matmul" in kind:  # by turns fp16 for the newest architecture, and bf16 for the oldest
            chosen.append(max(alike, key=oldest if number % 2 else newest))
        else:
            chosen += [job for job in alike if job[1] == min(ARCHITECTURES)]
    return chosen


def _spread(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for names, value in arguments.items() for name in names.split()}


def compile_case(index: int, architecture: int) -> Compiled:
    case = list(cases())[index]
    constants = {name: value for name, value in case.arguments.items() if not isinstance(value, str)}
    signature = {name: value if isinstance(value, str) else "constexpr" for name, value in case.arguments.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("K", "N", "rows", "vocabulary")
    }
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    matrix = sorted(set(re.findall(r"\b(wgmma|mma)\.", made.asm["ptx"])))
    in_loops = [line for line in _loops(listing.splitlines()) if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in in_loops)
    return Compiled(case.name, architecture, registers, len(in_loops), spills, made.metadata.shared, matrix)


def _loops(lines: list[str]) -> list[str]:
    """Return the lines between a label and a later branch back to it, where no other loop lies between."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line))}
    loops: list[range] = []
    for i, line in enumerate(lines):
        found = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if found and labels[found[1]] < i - 1:  # one line back is the program's end, which waits for ever
            loops.append(range(labels[found[1]], i))
    innermost = [one for one in loops if not any(other != one and other.start in one for other in loops)]
    return [lines[i] for one in innermost for i in one]


def main() -> None:
    wanted = jobs(every="--every" in sys.argv[1:])
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for found in pool.map(compile_case, *zip(*wanted, strict=True), chunksize=8):
            print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main()
