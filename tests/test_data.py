"""Calibration data: windows, BOS, masks, what is dropped, and the held-out split."""

import json
import logging

import pytest
import torch

from lfq_lightning.checkpoints import open_checkpoint
from lfq_lightning.data import CalibrationData
from lfq_lightning.errors import UserError

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
