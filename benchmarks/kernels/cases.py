"""What is timed: operations at the shapes of Llama-3 8B and 70B, with what one would use instead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.ops.bitstream import pack, unpack
from lfq_lightning.ops.fake_quant import LevelTerms, fake_quantize
from lfq_lightning.ops.fake_quant import reference as fake_quant_reference
from lfq_lightning.ops.linear_soft_ce import linear_soft_ce
from lfq_lightning.ops.soft_round import soft_round
from lfq_lightning.quantized_tensor import QuantizedTensor

GPU = "cuda"
ROTATED_BYTES = 4e8  # so many bytes of buffers at least take turns
SHAPES_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BLOCKS_8B = 32


@dataclass(frozen=True)
class Side:
    """One way to compute a case: `run` on one set of buffers after the other."""

    buffers: list[tuple[Any, ...]]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operation at a shape.

    Args:
        bytes: read and written at least, once each.
        flop: of its products.
        sides: name → what makes a Side; ours first.
        products: the dtype they run in.
    """

    operation: str
    name: str
    bytes: float
    flop: float
    sides: Callable[[], dict[str, Callable[[], Side]]]
    products: torch.dtype = torch.bfloat16


def _rotate(make: Callable[[], tuple[Any, ...]], size: float) -> list[tuple[Any, ...]]:
    """Return sets of buffers of `size` bytes each."""
    return [make() for _ in range(1 + min(15, int(ROTATED_BYTES // size)))]


# ---- quantise and dequantise -----------------------------------------------------------------------------------------


def _fake_quant(o: int, i: int, backward: bool, offset: bool) -> Case:
    def make() -> tuple[Any, ...]:
        shape = (o, i // 128, 128)
        latent, log_s2 = torch.randn(shape, device=GPU), torch.randn(shape, device=GPU) * 0.01
        scale, zero = torch.rand(o, i // 128, 1, device=GPU) + 0.1, torch.full((o, i // 128, 1), 8.0, device=GPU)
        learned = [log_s2, torch.zeros(o, 1, 1, device=GPU), torch.zeros_like(latent) if offset else None]
        for tensor in (*learned, scale):
            if tensor is not None:
                tensor.requires_grad_(backward)
        if not backward:
            return latent, scale, zero, *learned
        with torch.autocast(GPU, torch.bfloat16):
            out = fake_quantize(LevelTerms(latent, *learned), scale, zero, 15)
        wanted = [tensor for tensor in (*learned, scale) if tensor is not None]
        return out, wanted, torch.randn_like(out)

    def forward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(latent: Tensor, scale: Tensor, zero: Tensor, *learned: Tensor | None) -> Tensor:
            with torch.autocast(GPU, torch.bfloat16):
                return function(LevelTerms(latent, *learned), scale, zero, 15)

        return run

    def plain(terms: LevelTerms, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
        """The formula in PyTorch, for its compiler."""
        assert terms.log_divisor is not None and terms.row_log_divisor is not None
        levels = terms.latent * torch.exp(-(terms.log_divisor + terms.row_log_divisor)) / scale
        if terms.offset is not None:
            levels = levels + terms.offset.clamp(-0.5, 0.5)
        return (((levels.round() + zero).clamp(0, max_code) - zero) * scale).bfloat16()

    def eager(terms: LevelTerms, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
        levels = fake_quant_reference.level_tensor(terms, scale)
        return fake_quant_reference.fake_quantize(levels, scale, zero, max_code).bfloat16()

    def sides() -> dict[str, Callable[[], Side]]:
        if backward:

            def differentiate(out: Tensor, wanted: list[Tensor], grad: Tensor) -> None:
                torch.autograd.grad(out, wanted, grad, retain_graph=True)

            return {"triton": lambda: Side(_rotate(make, size), differentiate)}
        return {
            "triton": lambda: Side(_rotate(make, size), forward(fake_quantize)),
            "torch.compile": lambda: Side(_rotate(make, size), forward(torch.compile(plain))),
            "reference": lambda: Side(_rotate(make, size), forward(eager)),
        }

    size = ((14 if backward else 10) + (8 if backward else 4) * offset) * o * i
    way = "backward" if backward else "forward"
    return Case("fake_quant", f"{way} {o}x{i} g128{' offset' * offset}", size, 0, sides)


def _soft_round(o: int, i: int, backward: bool) -> Case:
    size = (14 if backward else 10) * o * i

    def make() -> tuple[Any, ...]:
        position, low = torch.randn(o, i // 128, 128, device=GPU), torch.randint(0, 15, (o, i // 128, 128), device=GPU)
        scale, zero = torch.rand(o, i // 128, 1, device=GPU) + 0.1, torch.full((o, i // 128, 1), 8.0, device=GPU)
        given = (position.requires_grad_(backward), scale.requires_grad_(backward), low.float(), zero)
        if not backward:
            return given
        out = forward(*given)
        return out, (position, scale), torch.randn_like(out)

    def forward(*given: Tensor) -> Tensor:
        with torch.autocast(GPU, torch.bfloat16):
            return soft_round(*given, 10.0, 15)

    def differentiate(out: Tensor, wanted: tuple[Tensor, ...], grad: Tensor) -> None:
        torch.autograd.grad(out, wanted, grad, retain_graph=True)

    run = differentiate if backward else forward
    way = "backward" if backward else "forward"
    return Case(
        "soft_round", f"{way} {o}x{i} g128", size, 0, lambda: {"triton": lambda: Side(_rotate(make, size), run)}
    )


# ---- the logit loss --------------------------------------------------------------------------------------------------


def _linear_soft_ce(tokens: int, width: int, vocabulary: int) -> Case:
    def make() -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(tokens, width, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocabulary, width, device=GPU, dtype=torch.bfloat16) * 0.02
        return hidden, weight, torch.randn(tokens, width, device=GPU)

    def ours(hidden: Tensor, weight: Tensor, moment: Tensor) -> None:
        linear_soft_ce(hidden, weight, moment).mean().backward()

    def two_products(hidden: Tensor, weight: Tensor, _: Tensor) -> None:
        with torch.no_grad():
            for part in weight.split(2**14):
                logits = hidden @ part.T
                logits @ part

    def liger() -> Side:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

        def run(hidden: Tensor, weight: Tensor, _: Tensor) -> None:
            labels = torch.zeros(tokens, dtype=torch.long, device=GPU)
            loss(hidden, weight, hidden.detach(), weight, labels).backward()

        return Side([make()], run)

    sides = {
        "triton": lambda: Side([make()], ours),
        "two bare products": lambda: Side([make()], two_products),
        "liger chunked distillation": liger,
    }
    size = 2 * (2 * vocabulary * width) + 3 * 4 * tokens * width
    return Case(
        "linear_soft_ce", f"{tokens}x{width}x{vocabulary}", size, 4 * tokens * width * vocabulary, lambda: sides
    )


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


def _gptq(name: str, o: int, i: int) -> Case:
    def make() -> tuple[Tensor, Tensor]:
        x = torch.randn(2 * i, i, device=GPU)
        return torch.randn(o, i, device=GPU) * 0.02, x.T @ x

    def solve(weight: Tensor, hessian: Tensor) -> None:
        from lfq_lightning.quantizers.gptq import GPTQ

        quantizer = GPTQ(weight, IntegerGrid(4, 128), torch.bfloat16)
        quantizer.hessian.copy_(hessian)
        quantizer.solve()

    flop = 4 / 3 * i**3 + o * i * i  # two Cholesky factors, an inverse, the errors' products
    label = f"{name} {o}x{i}, once of {BLOCKS_8B}"
    sides = {"triton": lambda: Side([make()], solve)}
    return Case("gptq_solve", label, 4 * (2 * o * i + i * i), flop, lambda: sides, torch.float32)


# ---- the packed product ----------------------------------------------------------------------------------------------


def _random(o: int, i: int, bits: int) -> QuantizedTensor:
    codes = torch.randint(0, 2**bits, (o, i), dtype=torch.uint8, device=GPU)
    scale = torch.rand(o, i // 128, 1, device=GPU, dtype=torch.bfloat16)
    return QuantizedTensor(codes, scale, torch.full_like(scale, 2 ** (bits - 1)).byte(), IntegerGrid(bits, 128))


def _packed_matmul(m: int, o: int, i: int, bits: int) -> Case:
    size = o * i * bits / 8 + o * (i // 128) * 4 + 2 * m * (o + i)

    def x() -> Tensor:
        return torch.randn(m, i, device=GPU, dtype=torch.bfloat16)

    def ours() -> Side:
        from lfq_lightning.ops.packed_matmul import triton

        return Side(
            _rotate(lambda: (x(), triton.tile(_random(o, i, bits)).words), size), _with_grid(triton, o, i, bits)
        )

    def dense() -> Side:
        return Side(_rotate(lambda: (x(), torch.randn(o, i, device=GPU, dtype=torch.bfloat16)), 2 * o * i), F.linear)

    def tinygemm() -> Side:
        def make() -> tuple[Tensor, Tensor, Tensor]:
            nibbles = torch.randint(0, 256, (o, i // 2), dtype=torch.uint8, device=GPU)
            packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
            return x(), packed, torch.rand(i // 128, o, 2, device=GPU, dtype=torch.bfloat16)

        return Side(
            _rotate(make, size), lambda x, packed, pair: torch.ops.aten._weight_int4pack_mm(x, packed, 128, pair)
        )

    def nf4() -> Side:
        import bitsandbytes
        from bitsandbytes.functional import quantize_4bit

        def make() -> tuple[Any, ...]:
            weight = torch.randn(o, i, device=GPU, dtype=torch.bfloat16)
            packed, state = quantize_4bit(weight, blocksize=128, quant_type="nf4")
            return x(), packed, state

        return Side(_rotate(make, size), lambda x, packed, state: bitsandbytes.matmul_4bit(x, packed.t(), state))

    def gemlite() -> Side:
        from gemlite.core import DType, GemLiteLinear

        def make() -> tuple[Any, ...]:
            layer = GemLiteLinear(
                W_nbits=bits,
                group_size=128,
                in_features=i,
                out_features=o,
                input_dtype=DType.BF16,
                output_dtype=DType.BF16,
            )
            q = _random(o, i, bits)
            layer.pack(q.codes, q.scale[:, :, 0], q.zero_point[:, :, 0].to(q.scale.dtype), None)
            return x(), layer

        return Side(_rotate(make, size), lambda x, layer: layer(x))

    sides: dict[str, Callable[[], Side]] = {"triton": ours, "cublas bf16": dense}
    if bits == 4:
        sides |= {"tinygemm": tinygemm, "bitsandbytes nf4": nf4}
    if bits != 3 and (m, o) == (1, 28672):  # it tries its configurations for a minute, once a case
        sides |= {"gemlite": gemlite}
    return Case("packed_matmul", f"W{bits} {m}x{o}x{i}", size, 2 * m * o * i, lambda: sides)


def _with_grid(triton: Any, o: int, i: int, bits: int) -> Callable[[Tensor, Tensor], Tensor]:
    tiled = triton.tile(_random(o, i, bits))
    return lambda x, words: triton.matmul(x, replace(tiled, words=words))


# ---- bitstreams ------------------------------------------------------------------------------------------------------


def _bitstream(o: int, i: int, bits: int, unpacks: bool) -> Case:
    def make() -> tuple[Tensor]:
        codes = torch.randint(0, 2**bits, (o, i), dtype=torch.uint8, device=GPU)
        return (pack(codes, bits) if unpacks else codes,)

    def run(tensor: Tensor) -> Tensor:
        return unpack(tensor, bits, i) if unpacks else pack(tensor, bits)

    name = f"{'unpack' if unpacks else 'pack'} {bits} bits {o}x{i}"
    return Case(
        "bitstream", name, o * i * (1 + bits / 8), 0, lambda: {"triton": lambda: Side(_rotate(make, o * i), run)}
    )


def _cases() -> Iterator[Case]:
    for o, i in ((28672, 8192), (8192, 28672), (28672, 4096), (4096, 4096)):
        for bits in (2, 3, 4, 8):
            for m in (1, 16, 256):
                yield _packed_matmul(m, o, i, bits)
    yield _linear_soft_ce(8192, 4096, 128256)
    yield _linear_soft_ce(8192, 8192, 128256)
    for name, (o, i) in SHAPES_8B.items():
        yield _gptq(name, o, i)
    for bits in (3, 4):
        for unpacks in (False, True):
            yield _bitstream(14336, 4096, bits, unpacks)
    for o, i in ((14336, 4096), (28672, 8192)):
        for backward in (False, True):
            yield _soft_round(o, i, backward)
            for offset in (False, True):
                yield _fake_quant(o, i, backward, offset)


CASES = list(_cases())
