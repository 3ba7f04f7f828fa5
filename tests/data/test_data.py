"""Calibration data: windows, BOS, masks, what is dropped, and the held-out split."""

import json
import logging
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from lfq_lightning.cli import main
from lfq_lightning.data import CalibrationData
from lfq_lightning.data.chosen_token import ChosenToken
from lfq_lightning.data.pack_sequences import pack_sequences
from lfq_lightning.data.roomy_cache import roomy_cache
from lfq_lightning.data.self_generate import _draw
from lfq_lightning.data.source import Source, shares
from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from tests.helpers import save_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(llama):
    return open_checkpoint(str(llama))


def lines(tokens):
    return [row[keep].tolist() for row, keep in zip(tokens.input_ids, tokens.mask, strict=True)]


def test_text_windows(checkpoint, text_file, caplog):
    data = CalibrationData(str(text_file), num_samples=20, seq_len=32, num_held_out=5, seed=1)
    with caplog.at_level(logging.INFO):
        train, held_out = data.token_sets(checkpoint, CPU)
    assert train.input_ids.shape == (20, 32)
    assert held_out.mask.shape == (5, 32)
    documents = text_file.read_text().split("<|endoftext|>")
    tokenizer = checkpoint.tokenizer()
    homes = []
    for row in lines(train) + lines(held_out):
        assert row[0] == tokenizer.bos_token_id
        assert 4 <= len(row) <= 32
        text = tokenizer.decode(row[1:])
        homes.append({i for i, document in enumerate(documents) if text.strip() in document})
        assert homes[-1]
    assert not set.union(*homes[:20]) & set.union(*homes[20:])  # held-out documents are not calibrated on
    assert "dropped as shorter than 4 tokens" in caplog.text


def test_seed_decides(checkpoint, text_file):
    def rows(seed):
        data = CalibrationData(str(text_file), num_samples=9, seq_len=32, num_held_out=4, seed=seed)
        return [lines(tokens) for tokens in data.token_sets(checkpoint, CPU)]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_one_long_document_is_split_by_windows(checkpoint, tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("".join(f"{i} " for i in range(400)))
    train, held_out = CalibrationData(str(file), 10, 32, num_held_out=6).token_sets(checkpoint, CPU)
    assert len(train) == 10
    assert len(held_out) == 6
    assert not {tuple(row) for row in lines(train)} & {tuple(row) for row in lines(held_out)}


@pytest.mark.parametrize("seed", range(4))
def test_few_documents_are_enough(checkpoint, tmp_path, seed):
    """One document is much longer than the other: whichever is held out, its surplus is calibrated on."""
    file = tmp_path / "two.txt"
    file.write_text("".join(f"{i} " for i in range(600)) + "<|endoftext|>" + "a short one, of three windows or so " * 3)
    train, held_out = CalibrationData(str(file), 30, 32, num_held_out=6, seed=seed).token_sets(checkpoint, CPU)
    assert (len(train), len(held_out)) == (30, 6)
    long = {tuple(row) for row in lines(held_out) if len(row) == 32 and row[1] < 60}
    assert not long & {tuple(row) for row in lines(train)}


def test_template_refusals(chat_llama, tmp_path):
    chat = open_checkpoint(str(chat_llama))
    with pytest.raises(UserError, match="leaves no room beside the chat template"):
        CalibrationData(num_samples=2, seq_len=3).token_sets(chat, CPU)


def test_jsonl(chat_llama, checkpoint, tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)))
    chat = open_checkpoint(str(chat_llama))
    train, _ = CalibrationData(str(file), 5, 24, num_held_out=3).token_sets(chat, CPU)
    for row in lines(train):
        text = chat.tokenizer().decode(row)
        assert text.startswith("<u>hello")
        assert text.endswith("</s>")
    with pytest.raises(UserError, match="chat template"):
        CalibrationData(str(file), 5, 24).token_sets(checkpoint, CPU)
    file.write_text("\n".join(json.dumps({"text": f"some plain text number {i}"}) for i in range(8)))
    train, _ = CalibrationData(str(file), 5, 24, num_held_out=3).token_sets(checkpoint, CPU)
    assert all("plain" in checkpoint.tokenizer().decode(row) for row in lines(train))


def test_datasets_folder(checkpoint, tmp_path):
    """A folder goes through `datasets.load_dataset`, the same path as a hub name."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = "\n".join(json.dumps({"text": f"row {i} of a data set"}) for i in range(9))
    (folder / "train.jsonl").write_text(rows)
    data = CalibrationData(str(folder), 5, 24, num_held_out=3)
    data.check(checkpoint)
    train, _ = data.token_sets(checkpoint, CPU)
    assert all("of a data set" in checkpoint.tokenizer().decode(row) for row in lines(train))
    with pytest.raises(UserError, match="cannot be read"):
        CalibrationData(str(folder), 5, 24, split="nonsense").token_sets(checkpoint, CPU)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "a.txt", "gives 0 sequences"),
        ("tiny", "a.txt", "gives 1 sequences|gives 0 sequences"),
        ('{"text": "x"}\n{oops', "a.jsonl", "line 2 is not JSON"),
        ('{"body": "x"}', "a.jsonl", "neither a `text` nor a `messages`"),
        ('{"messages": ["hi"]}', "a.jsonl", "line 1 has a message without role and content"),
        (b"\xff\xfe\x00", "a.txt", "not UTF-8"),
        (b"\xff\xfe\x00", "a.jsonl", "not UTF-8"),
    ],
)
def test_bad_files(checkpoint, tmp_path, content, name, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        CalibrationData(str(file), 4, 32).token_sets(checkpoint, CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 65}, "at most 64"),
        ({"seq_len": 1}, "seq_len"),
        ({"num_samples": 0}, "num_samples"),
        ({"dataset": "none.txt", "seq_len": 32}, "no file none.txt"),
    ],
)
def test_checked_before_reading(checkpoint, settings, message):
    with pytest.raises(UserError, match=message):
        CalibrationData(**settings).check(checkpoint)


@pytest.mark.parametrize("chat", [False, True])
def test_self_generated(checkpoint, chat_llama, chat, caplog):
    model = open_checkpoint(str(chat_llama)) if chat else checkpoint

    def rows(seed):
        data = CalibrationData(num_samples=6, seq_len=40, num_held_out=3, seed=seed)
        train, held_out = data.token_sets(model, CPU)
        assert train.input_ids.shape == (6, 40)
        assert held_out.input_ids.shape == (3, 40)
        return lines(train) + lines(held_out)

    state = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO):
        found = rows(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found == rows(1)
    assert found != rows(2)
    tokenizer = model.tokenizer()
    for row in found:
        assert len(row) >= 5
        assert tokenizer.eos_token_id not in row[:-1] or chat
        if chat:
            text = tokenizer.decode(row)
            assert text.startswith("<u>")
            assert "</s><a>" in text  # the question ended as the template ends it, then the answer began
        else:
            assert row[0] == tokenizer.bos_token_id
    assert "9 sequences from self_generated" in caplog.text


def test_shares_by_largest_remainder():
    sources = [Source("a", 2.0), Source("b", 1.0), Source("c", 1.0)]
    assert shares(sources, 10) == [5, 3, 2] and shares(sources, 1) == [1, 0, 0] and sum(shares(sources, 7)) == 7


def test_packing_keeps_every_token_in_windows_that_fit():
    sequences = [[n] * length for n, length in enumerate([5, 9, 3, 2, 7, 1, 4, 10, 6])]
    windows = pack_sequences(sequences, 10)
    assert all(len(window) <= 10 for window in windows)
    assert sorted(token for window in windows for token in window) == sorted(t for s in sequences for t in s)
    assert windows[0] == [0] * 5 + [2] * 3 + [3] * 2 and len(windows) == 5


def test_a_mixture_takes_each_source_by_its_weight(checkpoint, text_file, tmp_path):
    other = tmp_path / "digits.txt"
    other.write_text("<|endoftext|>".join(f"{n}" * 40 for n in range(10)))
    mixture = [{"source": str(text_file), "weight": 3}, {"source": str(other), "weight": 1}]
    data = CalibrationData(mixture, num_samples=8, seq_len=24, num_held_out=4)
    train, held_out = data.token_sets(checkpoint, CPU)
    texts = [checkpoint.tokenizer().decode(row[1:]) for row in (*train.input_ids, *held_out.input_ids)]
    of_digits = [text.strip("!\0").isdigit() for text in texts]
    assert sum(of_digits[:8]) == 2 and sum(of_digits[8:]) == 1
    assert of_digits[:8] != sorted(of_digits[:8]), "spread over the whole"


def test_packing_leaves_few_pads(checkpoint, text_file):
    pads = []
    for pack in (False, True):
        data = CalibrationData(str(text_file), num_samples=8, seq_len=64, num_held_out=4, pack=pack)
        train, held_out = data.token_sets(checkpoint, CPU)
        assert len(train) == 8 and len(held_out) == 4
        pads.append(1 - float(train.mask.float().mean()))
    assert pads[1] < 0.25 < pads[0]


@pytest.mark.parametrize("pack", [False, True])
def test_traces_answer_the_prompts(chat_llama, tmp_path, pack):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"question": "one?"}\n{"prompt": "two?"}\n')
    data = CalibrationData(
        [{"source": "self_generated", "prompts": str(prompts)}], num_samples=4, seq_len=48, num_held_out=2, pack=pack
    )
    checkpoint = open_checkpoint(str(chat_llama))
    data.check(checkpoint)
    train, held_out = data.token_sets(checkpoint, CPU)
    texts = [checkpoint.tokenizer().decode(row[mask]) for row, mask in zip(train.input_ids, train.mask, strict=True)]
    assert len(texts) == 4 and len(held_out) == 2
    assert all(text.startswith(("<u>one?</s><a>", "<u>two?</s><a>")) for text in texts)
    again, _ = data.token_sets(checkpoint, CPU)
    assert torch.equal(again.input_ids, train.input_ids)


def test_prompts_are_held_out_too_and_short_ones_get_long_answers(chat_llama, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join([*(f"{n}?" for n in range(9)), "a long question " * 2]))
    data = CalibrationData(
        [{"source": "self_generated", "prompts": str(prompts)}], num_samples=12, seq_len=48, num_held_out=4
    )
    checkpoint = open_checkpoint(str(chat_llama))
    train, held_out = data.token_sets(checkpoint, CPU)
    asked = []
    for part in (train, held_out):
        texts = [checkpoint.tokenizer().decode(row[m]) for row, m in zip(part.input_ids, part.mask, strict=True)]
        asked.append({text.partition("</s>")[0] for text in texts})
    assert asked[0].isdisjoint(asked[1])
    lengths = [int(mask.sum()) for mask in (*train.mask, *held_out.mask)]
    assert max(lengths) <= 48
    ended = [257 in row[m][-1:].tolist() for row, m in zip(train.input_ids, train.mask, strict=True)]
    assert all(length == 48 or end for length, end in zip(lengths[:12], ended, strict=True))


def test_nothing_is_written_twice(chat_llama, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one?")
    source = {"source": "self_generated", "prompts": str(prompts)}
    data = CalibrationData([source, source], num_samples=4, seq_len=48, num_held_out=4)
    train, held_out = data.token_sets(open_checkpoint(str(chat_llama)), CPU)
    assert len(torch.cat([train.input_ids, held_out.input_ids]).unique(dim=0)) == 8


def test_an_edited_file_is_another_run(text_file, tmp_path):
    file = tmp_path / "t.txt"
    file.write_text(text_file.read_text())
    assert CalibrationData([{"source": "self_generated"}, {"source": str(file)}]).files() == [file]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "the mixture is empty"),
        ([{"weight": 1}], "`{source: …, weight: …}`"),
        ([{"source": "x", "wieght": 1}], "did you mean 'weight'"),
        ([{"source": "x", "weight": 0}], "must be a positive number"),
        ([{"source": "x.txt", "prompts": "p.txt"}], "prompts go with"),
        ([{"source": "self_generated", "prompts": "gone.txt"}], "gone.txt cannot be read"),
    ],
)
def test_mistaken_mixtures(checkpoint, dataset, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CalibrationData(dataset, num_samples=2, seq_len=16, num_held_out=1).check(checkpoint)


def test_what_lfq_data_prints(config, capsys, text_file):
    main(["data", "--config", str(config()), "--examples", "1", "--data.pack", "true"])
    printed = capsys.readouterr().out
    assert "calibration" in printed and "sequence 0, " in printed and "of beer on wall" in printed


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_a_cache_with_room_gives_the_models_own_logits(tmp_path, family):
    """Greedy continuations and logits as with transformers' own cache, past several times its room."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, family, max_position_embeddings=256))
    ids = torch.randint(0, 250, (3, 5), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": 150, "min_new_tokens": 150, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    theirs, ours = model.generate(ids, **options), model.generate(ids, **options, **roomy_cache(model))
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_tokens_are_drawn_by_their_probability():
    """Frequencies of 20,000 draws are those of the softmax, within five standard deviations."""
    scores = torch.tensor([0.5, -1.0, 2.0, -torch.inf, 0.0]).repeat(20_000, 1)
    torch.manual_seed(0)
    left = ChosenToken(_draw)(torch.zeros(0), scores)
    assert torch.equal((left == 0).sum(1), torch.ones(20_000, dtype=torch.long))
    assert bool(((left == 0) | (left == -torch.inf)).all())
    found, p = (left == 0).double().mean(0), scores[0].double().softmax(-1)
    assert bool(((found - p).abs() <= 5 * (p * (1 - p) / 20_000).sqrt()).all())


def test_rows_of_a_batch_do_not_see_each_other_or_their_pads(chat_llama):
    """A prompt that is padded on the left is continued as it is alone."""
    model = AutoModelForCausalLM.from_pretrained(chat_llama)
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    together = [model.generate(**_padded(prompts), max_new_tokens=6, do_sample=False, **roomy_cache(model))]
    for row, prompt in zip(together[0], prompts, strict=True):
        alone = model.generate(**_padded([prompt]), max_new_tokens=6, do_sample=False)[0]
        assert row[-6:].tolist() == alone[-6:].tolist()


def _padded(prompts):
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "pad_token_id": 0}
