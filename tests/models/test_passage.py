"""What travels beside hidden states: every tensor comes back as it went in, in any dtype of the stream."""

import pytest
import torch

from lfq_lightning.models.passage import Passage, Slot


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_packed_is_unpacked(stream):
    generator = torch.Generator().manual_seed(0)
    state = {
        ("indices",): torch.randint(-1, 2_000_000, (2, 6, 5), generator=generator),
        ("kept",): torch.rand(2, 6, generator=generator) > 0.5,
        ("tokens",): torch.randint(0, 300_000, (2, 6), generator=generator),
        ("shared", "full", 0): torch.randn(2, 3, 6, 4, generator=generator).to(stream),
        ("shared", "full", 1): torch.randn(2, 3, 6, 8, generator=generator).to(stream),
    }
    passage = Passage((7,), {}, {"shared": {}}, None)
    hidden = torch.randn(2, 6, 7, generator=generator).to(stream)
    packed = passage.pack(hidden, state, 1)
    assert packed.shape == (2, 6, 7 + 15 + 3 + 3 + 12 + 24) and packed.dtype == stream
    found, back = passage.unpack(packed, 1)
    assert torch.equal(found, hidden) and back.keys() == state.keys()
    for place, tensor in state.items():
        assert back[place].dtype == tensor.dtype and torch.equal(back[place], tensor), place
    (full,) = passage.given({"shared": {}}, back, stream)["shared"].values()
    assert torch.equal(full[1], state["shared", "full", 1])


def test_a_state_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"hands on memory \(2, 5\), which has no dimension of tokens"):
        Slot.of(("memory",), torch.zeros(2, 5), 6)
