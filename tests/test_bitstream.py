"""The packer against a bit-by-bit loop, and against compressed-tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfq_lightning.bitstream import pack, unpack
from lfq_lightning.pack_format import pack_tensors, quantization_config, schemes_of, unpack_tensors
from lfq_lightning.quant_scheme import QuantScheme
from lfq_lightning.quantized_tensor import QuantizedTensor


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 130), seed=st.integers(0, 99))
def test_round_trip_and_layout(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).byte()
    words = pack(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack(words, bits, columns), codes)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert [word & 0xFFFFFFFF for word in packed] == [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(packed))]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [31, 32, 63, 96, 100])
def test_same_bytes_as_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (7, columns), generator=torch.Generator().manual_seed(bits)).byte()
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))
    zero_points = (codes[:, :5].int() - 2 ** (bits - 1)).to(torch.int8)
    packed = pack(codes[:, :5].T.contiguous(), bits).T
    assert torch.equal(packed, helpers.pack_to_int32(zero_points, bits, packed_dim=0))


@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 3, 16]),
    rows=st.integers(1, 9),
)
def test_format_round_trip(bits, symmetric, groups, group_size, rows):
    scheme = QuantScheme(bits, group_size, symmetric)
    torch.manual_seed(rows)
    zero = torch.full((rows, groups, 1), scheme.middle_code).byte()
    if not symmetric:
        zero = torch.randint(0, 2**bits, (rows, groups, 1)).byte()
    quantized = QuantizedTensor(
        torch.randint(0, 2**bits, (rows, groups * group_size)).byte(), torch.randn(rows, groups, 1), zero, scheme
    )
    back = unpack_tensors("layer", pack_tensors("layer", quantized), scheme)
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(back, name), getattr(quantized, name))


def test_schemes_survive_the_config():
    schemes = {"a": QuantScheme(3, 64), "b": QuantScheme(4, -1, symmetric=False), "c": QuantScheme(3, 64)}
    assert schemes_of(quantization_config(schemes, []), list(schemes)) == schemes
    one = {"a": QuantScheme(3, 64), "b": QuantScheme(3, 64)}
    config = quantization_config(one, ["lm_head"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert schemes_of(config, ["a", "b"]) == one
