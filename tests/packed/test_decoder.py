"""Decoding through a cache in one place: the tokens of transformers' `generate`, and a step that can be captured."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import StaticCache

from lfq_lightning.models.cache_argument import cache_argument
from lfq_lightning.models.meta_model import meta_model
from lfq_lightning.packed import generate
from lfq_lightning.packed.decoder import Decoder, decodable
from lfq_lightning.packed.generate import Writer
from lfq_lightning.packed.load_model import load
from lfq_lightning.packed.merge_layers import MergedPart
from lfq_lightning.packed.packed_linear import PackedLinear
from lfq_lightning.packed.sampler import Sampler
from tests.helpers import run, save_tiny


@pytest.fixture(params=["packed", "dense"])
def model(request, config):
    path = config()
    run(path)
    return load(path.parent / "run", dequantize=request.param == "dense")[0]


def theirs(model, prompt, tokens):
    with torch.no_grad():
        output = model.generate(prompt, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)
    return output[0, prompt.shape[1] :].tolist()


def test_answers_are_those_of_generate_one_prompt_after_another(model):
    assert decodable(model)
    decoder = Decoder(model, 40, graph=False, sampler=Sampler())
    for prompt in ([[7, 50, 3, 100, 9]], [[4]], [[9, 8, 200, 6, 5, 4, 3, 2, 1]]):
        ids = torch.tensor(prompt)
        expected = theirs(model, ids, 20)
        assert list(decoder.answer(ids, 20, set())) == expected
        end = expected[4]
        assert list(decoder.answer(ids, 20, {end})) == expected[: expected.index(end) + 1]


def test_what_a_capture_records_has_the_bits_of_an_eager_step(model, monkeypatch):
    """Where a stream is captured transformers leaves out what reads values; what it does then has the same bits.

    And the step compiles without a break, so nothing in it waits for the host (there, heads come in another order).
    """
    prompt = torch.tensor([[7, 50, 3, 100, 9]])

    def decode(forward, captures=False):
        cache, found = StaticCache(config=model.config, max_cache_len=16), []
        named = {cache_argument(model): cache, "use_cache": True}
        with torch.no_grad():
            token = model(input_ids=prompt, **named).logits[:, -1:].argmax(-1)
            with monkeypatch.context() as patched:
                if captures:
                    patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                for _ in range(5):
                    found.append(forward(input_ids=token, **named).logits)
                    token = found[-1].argmax(-1)
        return torch.cat(found)

    torch.compiler.reset()
    eager = decode(model)
    assert torch.equal(decode(model, captures=True), eager)
    compiled = decode(torch.compile(model, backend="eager", fullgraph=True))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_captured_is_written_by_generate(tmp_path):
    windows = save_tiny(tmp_path / "windows", "mistral", sliding_window=4)
    experts = save_tiny(tmp_path / "experts", "qwen2_moe", decoder_sparse_step=1, mlp_only_layers=[])
    for folder in (windows, experts):
        assert not decodable(meta_model(AutoConfig.from_pretrained(folder), folder))
    plain = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "plain"))
    assert decodable(plain)
    plain.generation_config = GenerationConfig(eos_token_id=257, repetition_penalty=1.3)
    assert not decodable(plain)
    plain.generation_config = GenerationConfig(repetition_penalty=1.0, num_beams=1, do_sample=True, top_p=0.9)
    assert decodable(plain)
    plain.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not decodable(plain)


def test_a_step_that_turns_out_not_to_be_capturable_is_written_by_generate(model, monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(generate, "Decoder", refuse)
    writer = Writer(model)
    writer._captures = True
    prompt = torch.tensor([[7, 50, 3]])
    with caplog.at_level("INFO"):
        assert writer.write(prompt, 8, set(), None) == theirs(model, prompt, 8)
    assert "cannot be captured (operation not permitted" in caplog.text


def test_a_writer_stops_at_an_end_and_tells_the_streamer(model):
    heard = []

    class Streamer:
        def put(self, value):
            heard.extend(value.flatten().tolist())

        def end(self):
            heard.append("end")

    prompt = torch.tensor([[7, 50, 3]])
    expected = theirs(model, prompt, 8)
    ends = {expected[3]}
    cut = expected[: expected.index(expected[3]) + 1]
    assert Writer(model).write(prompt, 8, ends, Streamer()) == cut
    assert heard == [7, 50, 3, *cut, "end"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_writes_what_an_eager_one_writes(config, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    checkpoint = save_tiny(tmp_path / "model", dtype=torch.bfloat16, **shape)
    grid = {"name": "rtn", "bits": 4, "group_size": 32}
    path = config(model={"checkpoint": str(checkpoint)}, plan=[{"match": "all", "quantizer": grid}])
    run(path)
    model, _ = load(path.parent / "run", device="cuda")
    assert {module.way for module in model.modules() if isinstance(module, PackedLinear)} == {"Triton kernel"}
    assert any(isinstance(module, MergedPart) for module in model.modules())
    captured, eager = (Decoder(model, 32, graph, Sampler()) for graph in (True, False))
    for prompt in ([[7, 50, 3, 100, 9]], [[4, 8]]):
        ids = torch.tensor(prompt, device="cuda")
        expected = list(eager.answer(ids, 20, set()))
        assert list(captured.answer(ids, 20, set())) == expected
        assert Writer(model).write(ids, 20, set(), None) == expected
    drawn, answers = Decoder(model, 32, True, Sampler(0.9, 0.95)), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(list(drawn.answer(ids, 20, set())))
    assert answers[0] == answers[1] != answers[2]  # a graph that is launched again draws anew
