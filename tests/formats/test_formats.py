"""Formats: exact round trips, layouts against bit-by-bit loops, and what a format cannot hold."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfq_lightning.errors import UserError
from lfq_lightning.formats import FORMATS, check_layout
from lfq_lightning.formats.named import require_grid
from lfq_lightning.grids import GRIDS
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.grids.round_to_nearest import round_to_nearest
from lfq_lightning.grids.search_scale import search_scale
from lfq_lightning.quantized_tensor import QuantizedTensor
from tests.helpers import random_tensor


def fits(name, scheme, shape):
    try:
        FORMATS.get(name)().check("layer", scheme, shape)
    except UserError:
        return False
    return True


OF_INTEGERS = [name for name in FORMATS.names() if name not in ("ggml", "mlx")]


@pytest.mark.parametrize("grid", GRIDS.names())
def test_round_trip_of_named_grids(grid):
    """Through the format that is theirs; all others refuse them, and say which it is."""
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * 0.1
    scheme = GRIDS.get(grid)().fitted(weight)
    pair = search_scale(weight, scheme, torch.bfloat16, 5)
    quantized = QuantizedTensor(round_to_nearest(weight, *pair, scheme).byte(), *pair, scheme)
    for name in FORMATS.names():
        found = FORMATS.get(name)()
        if name != scheme.format:
            with pytest.raises(UserError, match=r"layer is on the grid .*(export to|use grid)"):
                require_grid(found, "layer", scheme)
            continue
        require_grid(found, "layer", scheme)
        found.check("layer", scheme, (8, 512))
        tensors = found.pack("layer", quantized)
        check_layout(found, scheme, (8, 512), "layer", tensors, "here")
        back = found.unpack("layer", tensors, scheme)
        for part in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(back, part), getattr(quantized, part))
        damaged = {last: torch.full_like(t, torch.nan) if t.is_floating_point() else t for last, t in tensors.items()}
        if any(not torch.equal(damaged[last], t) for last, t in tensors.items()):
            with pytest.raises(UserError, match="holds NaN or infinity"):
                check_layout(found, scheme, (8, 512), "layer", damaged, "here")
        layers = ["model.layers.0.a", "model.layers.1.a"]
        assert found.schemes(found.config(dict.fromkeys(layers, scheme), ["lm_head"]), layers) == dict.fromkeys(
            layers, scheme
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_by_hand(bits):
    """Symmetric integers are held exactly: codes are one bit stream a row, the bias is what code 0 stands for."""
    quantized = random_tensor(4, 64, IntegerGrid(bits, 32))
    tensors = FORMATS.get("mlx")().pack("layer", quantized)
    for o in range(4):
        stream = sum(word << 32 * n for n, word in enumerate(tensors["layer.weight"][o].tolist()))
        assert [stream >> bits * i & (1 << bits) - 1 for i in range(64)] == quantized.codes[o].tolist()
    scale, bias = tensors["layer.scales"].double(), tensors["layer.biases"].double()
    weights = quantized.codes.view(4, 2, 32).double() * scale[..., None] + bias[..., None]
    assert torch.equal(weights.flatten(1).to(torch.float16), quantized.dequantize())


@pytest.mark.parametrize("name", OF_INTEGERS)
@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 3, 8, 16, 20, 32]),
    rows=st.sampled_from([1, 5, 8, 9, 32, 64, 100]),
    seed=st.integers(0, 99),
)
def test_round_trip(name, bits, symmetric, groups, group_size, rows, seed):
    scheme, shape = IntegerGrid(bits, group_size, symmetric), (rows, groups * group_size)
    if not fits(name, scheme, shape):
        return
    quantized, found = random_tensor(*shape, scheme, seed), FORMATS.get(name)()
    tensors = found.pack("layer", quantized)
    check_layout(found, scheme, shape, "layer", tensors, "here")
    assert set(tensors) == {f"layer.{last}" for last in found.layout(scheme, shape)}
    back = found.unpack("layer", tensors, scheme)
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(back, part), getattr(quantized, part))


def bits_of(word, start, count):
    return (word & 0xFFFFFFFF) >> start & (1 << count) - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("name", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_layout_by_hand(name, offset, bits):
    """qweight[:, o] is one bit stream of the codes of output o; qzeros[g] one of the zero points, less `offset`."""
    quantized = random_tensor(32, 64, IntegerGrid(bits, 32, symmetric=name == "gptq"))
    tensors = FORMATS.get(name)().pack("layer", quantized)
    for o in range(32):
        stream = sum((word & 0xFFFFFFFF) << 32 * n for n, word in enumerate(tensors["layer.qweight"][:, o].tolist()))
        assert [stream >> bits * i & (1 << bits) - 1 for i in range(64)] == quantized.codes[o].tolist()
    for g in range(2):
        stream = sum((word & 0xFFFFFFFF) << 32 * n for n, word in enumerate(tensors["layer.qzeros"][g].tolist()))
        found = [(stream >> bits * o & (1 << bits) - 1) + offset for o in range(32)]
        assert found == quantized.zero_point[:, g, 0].tolist()
    assert tensors["layer.g_idx"].tolist() == [0] * 32 + [1] * 32
    assert torch.equal(tensors["layer.scales"], quantized.scale[:, :, 0].T)


def test_symmetric_gptq_nibbles_are_seven():
    tensors = FORMATS.get("gptq")().pack("layer", random_tensor(8, 32, IntegerGrid(4, 32)))
    assert set(tensors["layer.qzeros"].flatten().tolist()) == {0x77777777}


def test_awq_layout_by_hand():
    """Bits 4n … 4n+3 of word w belong to output 8w + [0, 2, 4, 6, 1, 3, 5, 7][n]."""
    quantized = random_tensor(24, 64, IntegerGrid(4, 32, symmetric=False))
    tensors = FORMATS.get("awq")().pack("layer", quantized)
    for w in range(3):
        for n, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            for i in range(64):
                assert bits_of(tensors["layer.qweight"][i, w].item(), 4 * n, 4) == quantized.codes[8 * w + output, i]
            for g in range(2):
                zero = bits_of(tensors["layer.qzeros"][g, w].item(), 4 * n, 4)
                assert zero == quantized.zero_point[8 * w + output, g, 0]


@pytest.mark.parametrize("name", OF_INTEGERS)
def test_schemes_survive_the_config(name):
    """Layers of one scheme; and, where the format allows it, of several, beside dense ones."""
    found, layers = FORMATS.get(name)(), ["model.layers.0.a", "model.layers.1.a", "model.layers.10.a"]
    asymmetric = IntegerGrid(4, 64, symmetric=False)  # gptq's config can say it, though `check` refuses it
    one = dict.fromkeys(layers, asymmetric)
    assert found.schemes(found.config(one, ["lm_head"]), layers) == one
    if name != "awq":
        several = dict(
            zip(layers, [IntegerGrid(3, 64), IntegerGrid(4, -1, symmetric=False), IntegerGrid(3, 64)], strict=True)
        )
        assert found.schemes(found.config(several, ["model.layers.0.b", "lm_head"]), layers) == several


def test_compressed_tensors_config_as_engines_expect_it():
    config = FORMATS.get("compressed_tensors")().config({"a": IntegerGrid(3, 64), "b": IntegerGrid(3, 64)}, ["lm_head"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]


def test_targets_by_expression():
    """As llm-compressor may write them."""
    config = FORMATS.get("compressed_tensors")().config(
        {"m.0.q_proj": IntegerGrid(4, 64), "m.0.up": IntegerGrid(3)}, []
    )
    groups = config["config_groups"]
    groups["group_0"]["targets"], groups["group_1"]["targets"] = (
        ["re:.*q_proj$"] if group["weights"]["num_bits"] == 4 else ["re:.*up", "other"] for group in groups.values()
    )
    found = FORMATS.get("compressed_tensors")().schemes(config, ["m.0.q_proj", "m.1.q_proj", "m.0.up"])
    four = IntegerGrid(4, 64)
    assert found == {"m.0.q_proj": four, "m.1.q_proj": four, "m.0.up": IntegerGrid(3)}


def test_gptq_config_names_what_differs():
    config = FORMATS.get("gptq")().config(
        {"m.0.a": IntegerGrid(4, 64), "m.0.b": IntegerGrid(4, 64), "m.1.a": IntegerGrid(3, -1)}, ["m.1.b", "lm_head"]
    )
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 64, True)
    (excluded, _), (different, keys) = config["dynamic"].items()
    assert excluded.startswith("-:") and re.match(excluded[2:], "m.1.b") and not re.match(excluded[2:], "m.10b")
    assert different.startswith("+:") and re.match(different[2:], "m.1.a") and not re.match(different[2:], "m.1.ab")
    assert keys == {"bits": 3, "group_size": -1, "sym": True}


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "message"),
    [
        (
            "gptq",
            IntegerGrid(5, 32),
            (32, 32),
            "layer has 5 bits, but gptq holds 2, 3, 4 and 8; use compressed-tensors",
        ),
        ("gptq", IntegerGrid(4, 32, symmetric=False), (32, 32), "cannot store a zero point of 0, .* use gptq_v2"),
        ("gptq_v2", IntegerGrid(4, 8), (8, 36), "36 inputs of 4 bits, which fill no whole 32-bit words"),
        ("gptq", IntegerGrid(3, 32), (8, 32), "8 outputs of 3 bits"),
        ("awq", IntegerGrid(3, 32), (8, 32), "awq holds 4 only; use gptq_v2"),
        ("awq", IntegerGrid(4, 32), (12, 32), "awq needs a multiple of 8"),
    ],
)
def test_what_a_format_cannot_hold(name, scheme, shape, message):
    with pytest.raises(UserError, match=message):
        FORMATS.get(name)().check("layer", scheme, shape)


def test_values_that_a_format_cannot_hold():
    scales = random_tensor(8, 32, IntegerGrid(4, 32), dtype=torch.bfloat16)
    scales.scale[2] = 1e5
    with pytest.raises(UserError, match="layer has a scale beyond what fp16 holds"):
        FORMATS.get("awq")().pack("layer", scales)
    with pytest.raises(UserError, match="one scheme for all layers, but there are 2"):
        FORMATS.get("awq")().config({"a": IntegerGrid(4, 32), "b": IntegerGrid(4, 64)}, [])


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_a_scale_that_vanishes_in_fp16_makes_its_group_zero(name, caplog):
    quantized, packed = random_tensor(32, 32, IntegerGrid(4, 32), dtype=torch.bfloat16), FORMATS.get(name)()
    quantized.scale[2] = 1e-9
    back = packed.unpack("layer", packed.pack("layer", quantized), quantized.scheme).exact()
    expected = quantized.exact()
    assert float(back[2].abs().max()) == 0.0 and torch.equal(back[3:], expected[3:])
    assert "layer: 1 scales are too small" in caplog.text


def test_bf16_scales_are_exact_in_fp16():
    quantized = random_tensor(64, 64, IntegerGrid(4, 32), dtype=torch.bfloat16)
    back = FORMATS.get("awq")()
    scale = back.unpack("layer", back.pack("layer", quantized), quantized.scheme).scale
    assert torch.equal(scale.to(torch.bfloat16), quantized.scale)
