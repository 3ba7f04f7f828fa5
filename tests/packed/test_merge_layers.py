"""Layers that read the same input, joined: the same outputs, in one product."""

import pytest
import torch
from torch import nn

from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.packed import packed_linear
from lfq_lightning.packed.merge_layers import MergedPart, MergedProduct, merge_layers
from lfq_lightning.packed.packed_linear import PackedLinear
from tests.helpers import random_tensor

pytest.importorskip("triton")


@pytest.fixture
def device(kernel_device, monkeypatch):
    """Let layers go through the kernel, on the CPU through its interpreter."""
    monkeypatch.setattr(packed_linear, "runs_triton", lambda _: True)
    return kernel_device


def layer(outputs, device, bits=4, bias=False, inputs=96, group=32):
    weight = random_tensor(outputs, inputs, IntegerGrid(bits, group), dtype=torch.float16, device=device)
    return PackedLinear(weight, torch.randn(outputs, device=device).half() if bias else None), weight


def attention(device, **options):
    block, weights = nn.Module(), {}
    for name, outputs in (("q_proj", 70), ("k_proj", 33), ("v_proj", 32)):
        made, weights[name] = layer(outputs, device, **options)
        setattr(block, name, made)
    return block, weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_are_the_layers(bits, bias, device):
    block, weights = attention(device, bits=bits, bias=bias)
    biases = {name: getattr(block, name).bias for name in weights}
    assert merge_layers(block) == 3
    for shape in ((1, 1, 96), (2, 5, 96)):
        x = torch.randn(shape, device=device).half()
        for name, weight in weights.items():
            dense = weight.dequantize().double()
            exact = x.double() @ dense.T + (biases[name].double() if bias else 0)
            bound = (x.double().abs() @ dense.abs().T + 4) * 2 * torch.finfo(torch.float16).eps
            assert bool(((getattr(block, name)(x).double() - exact).abs() <= bound).all())


def test_one_product_for_each_input_and_nothing_held_after_it(device, monkeypatch):
    block, _ = attention(device)
    merge_layers(block)
    product = next(module for module in block.modules() if isinstance(module, MergedProduct))
    calls = []
    monkeypatch.setattr(product.linear, "_product", lambda rows: calls.append(rows) or rows.new_zeros(len(rows), 135))
    for _ in range(2):
        x = torch.randn(1, 96, device=device).half()
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block, name)(x)
        assert product._inputs is None and product._outputs is None
    assert len(calls) == 2
    other = torch.randn(1, 96, device=device).half()
    block.q_proj(x)
    block.k_proj(other)  # another input in between
    assert len(calls) == 4 and torch.equal(calls[2], x) and torch.equal(calls[3], other)


def test_what_is_not_alike_stays(device):
    block, _ = attention(device)
    block.k_proj = layer(33, device, bits=3)[0]
    block.gate_proj, block.up_proj = layer(64, device)[0], layer(64, device, bias=True)[0]
    assert merge_layers(block) == 0 and isinstance(block.q_proj, PackedLinear)
    block.up_proj = nn.Linear(96, 64)
    assert merge_layers(block) == 0


def test_layers_that_do_not_go_through_the_kernel_stay():
    block, _ = attention(torch.device("cpu"))
    assert merge_layers(block) == 0


def test_weights_stand_once_in_the_tree(device):
    block, weights = attention(device)
    before = sum(buffer.nbytes for name, buffer in block.named_buffers() if "arrivals" not in name)
    merge_layers(block)
    assert sum(buffer.nbytes for name, buffer in block.named_buffers() if "arrivals" not in name) == before
    assert [type(getattr(block, name)) for name in weights] == [MergedPart] * 3
    assert [(block.k_proj.in_features, block.k_proj.out_features)] == [(96, 33)]


def test_they_compile_without_a_break(device):
    block, weights = attention(device)
    merge_layers(block)

    def together(x):
        return torch.cat([getattr(block, name)(x + 1) for name in weights], dim=-1)

    def shared(x):
        x = x + 1
        return torch.cat([getattr(block, name)(x) for name in weights], dim=-1)

    x = torch.randn(1, 96, device=device).half()
    with torch.no_grad():
        for run in (shared, together):
            assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))
