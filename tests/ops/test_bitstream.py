"""The packer against a bit-by-bit loop, and against compressed-tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfq_lightning.ops.bitstream import pack, reference, unpack


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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 63), (7, 100), (70, 96), (3, 1000), (1, 4097)])
def test_kernels(bits, rows, columns, kernel_device):
    kernel = pytest.importorskip("lfq_lightning.ops.bitstream.triton")
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(bits)).byte()
    words = reference.pack(codes, bits)
    assert torch.equal(kernel.pack(codes.to(kernel_device), bits).cpu(), words)
    assert torch.equal(kernel.unpack(words.to(kernel_device), bits, columns).cpu(), codes)


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
