"""Texts, conversations and prompts as people have them: read as they are, or one sentence with their place."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import processors

from lfq_lightning.data import CalibrationData
from lfq_lightning.data.prompt_tokens import check_tokens, prompt_tokens, text_tokens
from lfq_lightning.data.read_documents import Conversation, check_documents, read_documents
from lfq_lightning.data.read_prompts import read_prompts
from lfq_lightning.data.self_generate import as_tokens
from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from tests.helpers import byte_tokenizer, save_tiny

TEXTS = ["one", "two\u2028lines", "a\u0085b", "ü — 漢字", "carriage\rreturn"]


def documents(file):
    check_documents(str(file))
    return list(read_documents(str(file), "train", None))


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_only_a_newline_ends_a_line(tmp_path, mark, ending):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((mark + "".join(json.dumps({"text": t}, ensure_ascii=False) + ending for t in TEXTS)).encode())
    assert documents(rows) == TEXTS
    prompts = tmp_path / "p.txt"
    prompts.write_bytes((mark + ending.join(text for text in TEXTS[:4]) + ending).encode())
    assert read_prompts(prompts, "here") == TEXTS[:4]


def test_every_kind_of_local_file_holds_the_same(tmp_path):
    texts = TEXTS[:4]
    (tmp_path / "a.TXT").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "d.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "e.csv").write_text("id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts)))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "f.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert documents(file) == texts, file.name


def test_a_local_file_is_not_looked_for_on_the_hub(tmp_path):
    file = tmp_path / "text.docx"
    file.write_text("x")
    with pytest.raises(UserError, match=r"is of no kind that is read here; give one of .txt, .jsonl"):
        check_documents(str(file))


def test_half_a_surrogate_pair_is_read_as_a_browser_does(tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text('{"text": "smile \\ud83d end"}\n{"text": "\\ud83d\\ude00"}\n')
    assert documents(file) == ["smile \ufffd end", "😀"]
    with pytest.raises(UserError, match="cannot be put into tokens"):
        text_tokens(byte_tokenizer(chat=False), "\ud83d")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 2 is not JSON"),
        ("{", "line 2 is not JSON"),
        ("3", "neither a `text` nor a `messages`"),
        ('{"messages": []}', "line 2 has no messages"),
        ('{"messages": [{"role": "user"}]}', "a message without role and content"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content is int, not text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "content that is no text"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": 3}', "`tools` that are no list"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "{"}', "its `tools` is not JSON"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, line, message):
    file = tmp_path / "r.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=message) as caught:
        documents(file)
    assert "line 2" in str(caught.value)


def test_parts_of_a_message_are_joined_and_tools_kept(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a "}, "b"]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
    ]
    file = tmp_path / "m.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": turns, "tools": t}) + "\n" for t in (tools, json.dumps(tools), None))
    )
    joined = [{"role": "user", "content": "a b"}, turns[1]]
    assert documents(file) == [Conversation(joined, tools), Conversation(joined, tools), Conversation(joined, None)]


def test_tools_are_in_the_calibration_text(tmp_path):
    model = save_tiny(tmp_path / "model")
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = "{{ tools | tojson if tools }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    row = {"messages": [{"role": "user", "content": "hello"}], "tools": [{"name": "weather"}]}
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    data = CalibrationData(str(file), num_samples=2, seq_len=60, num_held_out=1)
    train, _ = data.token_sets(open_checkpoint(str(model)), torch.device("cpu"))
    assert tokenizer.decode(train.input_ids[0][train.mask[0]]) == '[{"name": "weather"}]hello'


@pytest.mark.parametrize("row", ['{"prompt": null}', '{"prompt": ""}', '{"prompt": 3}', "{}", "[]"])
def test_a_prompt_that_is_no_text(tmp_path, row):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{row}\n')
    with pytest.raises(UserError, match=r"here: .*line 2 has no `prompt` or `question` that is a text"):
        read_prompts(file, "here")


def test_a_prompt_never_ends_in_eos():
    tokenizer = byte_tokenizer(chat=False)
    usual = as_tokens(["Once upon"], tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    assert tokenizer("Once upon")["input_ids"][-1] == 257
    assert as_tokens(["Once upon"], tokenizer) == usual and usual[0][0] == 256
    assert prompt_tokens(tokenizer, "", special=True) == [256]
    said = "over</s>"  # written by the user: it stays
    assert prompt_tokens(tokenizer, said, special=True) == [256, *text_tokens(tokenizer, said)]


def test_short_rows_name_the_cure(tmp_path, llama):
    file = tmp_path / "short.jsonl"
    file.write_text("".join(json.dumps({"text": f"r{n}"}) + "\n" for n in range(200)))
    checkpoint = open_checkpoint(str(llama))
    with pytest.raises(UserError, match=r"200 were dropped as shorter than 8; set `data.pack: true`"):
        CalibrationData(str(file), 8, 64, 2).token_sets(checkpoint, torch.device("cpu"))
    train, _ = CalibrationData(str(file), 8, 64, 2, pack=True).token_sets(checkpoint, torch.device("cpu"))
    assert len(train) == 8


def test_tokens_beyond_the_embeddings_are_named():
    tokenizer = byte_tokenizer(chat=False)
    check_tokens([[1, 2], []], 3, tokenizer)
    with pytest.raises(UserError, match=r"makes token 258 \('<u>'\), but the model's embeddings have 258 rows"):
        check_tokens([[1], [258]], 258, tokenizer)
