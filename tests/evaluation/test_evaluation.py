"""`lfq eval`: values against hand-written loops, answers that survive a stop, lm-eval's tasks on local files."""

import json
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM

from lfq_lightning.cli import main
from lfq_lightning.evaluation.answers import Answers
from lfq_lightning.evaluation.batches import in_batches
from lfq_lightning.evaluation.drift import drift_values, repetition, spans
from lfq_lightning.evaluation.evaluated_model import EvaluatedModel
from lfq_lightning.evaluation.paired import compare, mcnemar
from lfq_lightning.evaluation.text_loss import text_windows
from lfq_lightning.packed.load_model import load
from tests.helpers import byte_tokenizer, fails, run, save_tiny


@pytest.fixture
def packed(config, chat_llama):
    """Return the folder of a small run whose model has a chat template."""
    path = config(model={"checkpoint": str(chat_llama)})
    run(path)
    return path.parent / "run"


# ---- paired tests ----------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_by_enumeration():
    a, b = [1.0, 1, 1, 1, 0, 0, 1, 0], [0.0, 0, 0, 0, 1, 0, 1, 0]
    outcomes = [sum(coins) for coins in product([0, 1], repeat=5)]  # five pairs differ; four of them for a
    far = sum(abs(heads - 2.5) >= 1.5 for heads in outcomes) / len(outcomes)
    assert mcnemar(a, b) == far == compare(a, b).p
    assert mcnemar([1.0, 0.0], [1.0, 0.0]) == 1.0


def test_sign_flips_agree_with_all_of_them():
    a, b = [0.3, 1.2, -0.4, 0.9, 2.0, 0.1], [0.1, 0.7, 0.0, 0.2, 1.1, 0.3]
    d = [x - y for x, y in zip(a, b, strict=True)]
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in product([-1, 1], repeat=6)]
    exact = sum(each >= abs(sum(d)) - 1e-12 for each in sums) / len(sums)
    found = compare(a, b)
    assert found.p == pytest.approx(exact, abs=0.02)
    assert found.difference == pytest.approx(sum(d) / 6)
    assert found.test == "sign-flip" and found.low < found.difference < found.high
    assert compare(a, b) == found


def test_the_interval_of_a_wide_sample_is_the_normal_one():
    generator = torch.Generator().manual_seed(3)
    a = (torch.randn(800, generator=generator) + 0.2).tolist()
    found = compare(a, [0.0] * 800)
    spread = 1.96 * torch.tensor(a).std().item() / math.sqrt(800)
    assert found.low == pytest.approx(found.difference - spread, abs=0.01)
    assert found.high == pytest.approx(found.difference + spread, abs=0.01)


def test_values_that_are_no_numbers_give_no_p():
    found = compare([1.0, math.nan], [0.5, 0.5])
    assert math.isnan(found.p) and math.isnan(found.difference)


# ---- answers and batches ---------------------------------------------------------------------------------------------


def test_answers_survive_a_torn_line(tmp_path):
    answers = Answers(tmp_path / "deep" / "a.jsonl")
    answers.add([["q", 1], ["q", 2]], ["one", [2]])
    text = answers.file.read_text()
    answers.file.write_text(text[:-4])
    again = Answers(answers.file)
    assert ["q", 1] in again and again[["q", 1]] == "one" and ["q", 2] not in again
    again.add([["q", 2]], [[2]])
    assert answers.file.read_text() == text


def test_batches_halve_when_memory_runs_out():
    sizes = []

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return sum(batch)

    found = list(in_batches("work", list(range(7)), 5, work))
    assert found == [([0, 1], 1), ([2, 3], 5), ([4, 5], 9), ([6], 6)] and sizes == [5, 2, 2, 2, 1]


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_windows_join_documents_and_begin_with_bos(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("abcd<|endoftext|>efghij")
    windows = text_windows(str(file), byte_tokenizer(chat=False), 5)
    tokenizer = byte_tokenizer(chat=False)
    assert [tokenizer.decode(window) for window in windows] == ["<s>abcd", "<s>\n\nef", "<s>ghij"]
    assert len(text_windows(str(file), tokenizer, 30)) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_text_loss_is_that_of_a_plain_loop(family, tmp_path, text_file, config):
    model = save_tiny(tmp_path / "model", family)
    run(config(model={"checkpoint": str(model)}))
    output = tmp_path / "run"
    main(["eval", str(output), "--text", str(text_file), "--seq-len", "24", "--windows", "5", "--new-tokens", "0"])
    found = json.loads((output / "evaluation" / "evaluation.json").read_text())["parts"]["text text.txt"]
    student = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    kl, nll, agree, flips = [], [], [], []
    for window in text_windows(str(text_file), byte_tokenizer(chat=False), 24)[:5]:
        with torch.no_grad():
            q, p = (m(torch.tensor([window])).logits[0].double().log_softmax(-1) for m in (student, teacher))
        kl += F.kl_div(q, p, log_target=True, reduction="none").sum(-1).tolist()
        agree += (q.argmax(-1) == p.argmax(-1)).tolist()
        following = torch.tensor(window[1:])
        nll += (-q[:-1].gather(1, following[:, None])).flatten().tolist()
        flips += ((q[:-1].argmax(-1) == following) != (p[:-1].argmax(-1) == following)).tolist()
    expected = {
        "kl": sum(kl) / len(kl),
        "top1_agreement": sum(agree) / len(agree),
        "flip_rate": sum(flips) / len(flips),
        "perplexity": math.exp(sum(nll) / len(nll)),
    }
    for name, value in expected.items():
        assert found[name][str(output)]["value"] == pytest.approx(value, rel=1e-3), name
    assert found["kl"]["full precision"]["value"] == pytest.approx(0, abs=1e-6)


# ---- greedy answers --------------------------------------------------------------------------------------------------


def test_drift_by_hand():
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 1, 2, 1, 2, 1]) == 1 - 2 / 4
    assert repetition([1, 2]) == 0.0
    values = drift_values([[5, 6, 9], [5, 7], []], [[5, 6, 9], [5, 6, 9], [1]], {9})
    assert values["tokens_before_difference"] == [3.0, 1.0, 0.0]
    assert values["finished"] == [1.0, 0.0, 0.0] and values["same_answer"] == [1.0, 0.0, 0.0]


def test_greedy_answers_in_a_batch_are_those_alone(packed, chat_llama, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("hello\nwhat is the answer to all of it?\nhm\n")
    main(["eval", str(packed), "--prompts", str(prompts), "--new-tokens", "9"])
    teacher = AutoModelForCausalLM.from_pretrained(chat_llama)
    model = EvaluatedModel(str(chat_llama), torch.device("cpu"), packed / "evaluation")
    tokenizer = model.tokenizer
    for prompt in prompts.read_text().splitlines():
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        alone = teacher.generate(**ids, do_sample=False, max_new_tokens=9)[0, ids["input_ids"].shape[1] :].tolist()
        assert model.answers[["greedy", ids["input_ids"][0].tolist(), 9, [257]]] == alone
    found = json.loads((packed / "evaluation" / "evaluation.json").read_text())["parts"]["greedy answers"]
    assert found["same_answer"]["full precision"]["value"] == 1.0
    assert found["tokens_before_difference"][str(packed)]["examples"] == 3


def test_a_head_that_stays_packed_is_not_asked_for_its_weights(config, tmp_path):
    model = save_tiny(tmp_path / "model", chat=True, tied=False)
    grid = {"name": "rtn", "bits": 8, "group_size": 16}
    path = config(
        model={"checkpoint": str(model)}, plan=[{"match": name, "quantizer": grid} for name in ("head", "all")]
    )
    run(path)
    folder = path.parent / "run"
    main(["eval", str(folder), "--packed", "--new-tokens", "3"])
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text())["parts"]["greedy answers"]
    assert "same_answer" in found and not any("kl" in name for name in found)
    main(["eval", str(folder), "--new-tokens", "3"])
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text())["parts"]["greedy answers"]
    assert "kl_tokens_1_256" in found


@pytest.mark.parametrize("tokens", ["1", "3"])  # a stretch of one token
def test_answers_of_one_token(packed, tokens, monkeypatch):
    monkeypatch.setattr("lfq_lightning.evaluation.drift._FIRST_SPAN", 2)
    main(["eval", str(packed), "--new-tokens", tokens])
    found = json.loads((packed / "evaluation" / "evaluation.json").read_text())["parts"]["greedy answers"]
    assert found["kl_tokens_1_2"][str(packed)]["value"] > 0 and ("kl_tokens_3_4" in found) == (tokens == "3")


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [(5, 6)]),
        (256, [(5, 261)]),
        (257, [(5, 261), (261, 262)]),
        (1024, [(5, 261), (261, 517), (517, 1029)]),
    ],
)
def test_stretches_of_an_answer_double(length, expected):
    assert spans(5, length) == expected


def test_the_kl_along_full_precisions_answers_is_that_of_both_models_reading_them(
    packed, chat_llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("lfq_lightning.evaluation.drift._FIRST_SPAN", 2)
    (tmp_path / "p.txt").write_text("hello\nwhat is the answer?\n")
    main(["eval", str(packed), "--prompts", str(tmp_path / "p.txt"), "--new-tokens", "6"])
    found = json.loads((packed / "evaluation" / "evaluation.json").read_text())["parts"]["greedy answers"]
    teacher, student = AutoModelForCausalLM.from_pretrained(chat_llama), load(packed, dequantize=True)[0]
    model = EvaluatedModel(str(chat_llama), torch.device("cpu"), packed / "evaluation")
    expected = {"kl_tokens_1_2": [], "kl_tokens_3_4": [], "kl_tokens_5_8": []}
    for prompt in ("hello", "what is the answer?"):
        chat = [{"role": "user", "content": prompt}]
        ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = model.answers[["greedy", ids, 6, [257]]]
        whole = torch.tensor([ids + answer])
        with torch.no_grad():
            log_p, log_q = (each(whole).logits[0].double().log_softmax(-1) for each in (teacher, student))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[len(ids) - 1 : -1].tolist()
        for name, part in zip(expected, (kl[:2], kl[2:4], kl[4:6]), strict=True):
            expected[name] += part
    for name, values in expected.items():
        assert found[name][str(packed)]["value"] == pytest.approx(sum(values) / len(values), rel=1e-3), name
        assert found[name]["full precision"]["value"] == pytest.approx(0, abs=1e-6)


def test_parts_of_the_same_models_add_up(packed, text_file):
    main(["eval", str(packed), "--text", str(text_file), "--seq-len", "16", "--windows", "2", "--new-tokens", "0"])
    main(["eval", str(packed), "--new-tokens", "3"])
    parts = json.loads((packed / "evaluation" / "evaluation.json").read_text())["parts"]
    assert set(parts) == {"text text.txt", "greedy answers"}


def test_texts_of_one_name_stay_apart(packed, text_file, tmp_path):
    (tmp_path / "de").mkdir()
    other = tmp_path / "de" / text_file.name
    other.write_text("neunundneunzig Flaschen Bier an der Wand")
    main(["eval", str(packed), "--text", str(text_file), str(other), "--seq-len", "16", "--new-tokens", "0"])
    parts = json.loads((packed / "evaluation" / "evaluation.json").read_text())["parts"]
    assert set(parts) == {f"text {text_file}", f"text {other}"}


def test_a_new_end_token_asks_again(packed):
    before = EvaluatedModel(str(packed), torch.device("cpu"), packed).digest
    (packed / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    after = EvaluatedModel(str(packed), torch.device("cpu"), packed)
    assert after.digest != before and after.end_tokens() == {257, 258}


def test_a_second_call_asks_nothing_again(packed, monkeypatch, text_file):
    command = ["eval", str(packed), str(packed), "--text", str(text_file), "--seq-len", "16", "--new-tokens", "4"]
    main(command)
    first = (packed / "evaluation" / "evaluation.json").read_text()
    monkeypatch.setattr(EvaluatedModel, "model", property(lambda self: pytest.fail("a model was read")))
    main(command)
    assert (packed / "evaluation" / "evaluation.json").read_text() == first


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_cost_one_sentence(packed, capsys, tmp_path, text_file):
    folder, other = str(packed), str(save_tiny(tmp_path / "other", vocab_size=310))
    assert "nothing to measure" in fails(capsys, "eval", folder, "--new-tokens", "0")
    assert "there is no file" in fails(capsys, "eval", folder, "--text", "none.txt", "--new-tokens", "0")
    assert "--seq-len: 999 must be 2 … 64" in fails(
        capsys, "eval", folder, "--text", str(text_file), "--seq-len", "999"
    )
    assert "has a vocabulary of 300" in fails(capsys, "eval", folder, "--reference", other)
    assert "--prompts" in fails(capsys, "eval", folder, "--prompts", str(tmp_path / "none.txt"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "no prompt"}\n')
    assert "line 1 has no `prompt`" in fails(capsys, "eval", folder, "--prompts", str(rows))
    (packed / "lfq.yaml").unlink()
    assert "give --reference" in fails(capsys, "eval", folder)


# ---- lm-eval ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    (folder / "gsm8k").mkdir(parents=True)
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is. #### {n + 1}"} for n in range(8)]
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext").mkdir()
    pages = [" = A title = \n\n It is what it is .", " = Another = \n\n Nothing follows ; it ends ."]
    (folder / "wikitext" / "test.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    return folder


def _task(packed, data_dir, *more):
    main(["eval", str(packed), "--new-tokens", "0", "--data-dir", str(data_dir), "--limit", "4", *more])
    return json.loads((packed / "evaluation" / "evaluation.json").read_text())["parts"]


def test_tasks_on_local_files(config, tmp_path, data_dir):
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    model = save_tiny(tmp_path / "model", chat=True, max_position_embeddings=1024)
    run(config(model={"checkpoint": str(model)}))
    packed = tmp_path / "run"
    options = ("--tasks", "wikitext", "gsm8k", "--task-tokens", "8", "--no-chat", "--batch-size", "1")
    parts = _task(packed, data_dir, *options)
    manager = TaskManager()  # reads every task there is, which takes seconds
    stock = {name: load_yaml(manager.task_index[name].yaml_path) for name in ("gsm8k", "wikitext")}
    files = {"gsm8k": ("train", "test"), "wikitext": ("test", "test")}
    local = {
        name: {"train": str(data_dir / name / f"{train}.jsonl"), "test": str(data_dir / name / f"{test}.jsonl")}
        for name, (train, test) in files.items()
    }
    local["wikitext"]["validation"] = local["wikitext"]["test"]
    tasks = [
        config | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": local[name]}}
        for name, config in stock.items()
    ]
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(packed), "dtype": "float32"},
        tasks=[{key: value for key, value in task.items() if key != "tag"} for task in tasks],
        limit=4,
        device="cpu",
        gen_kwargs={"max_gen_toks": 8},
        task_manager=manager,
    )["results"]
    ours = parts["wikitext"]["word_perplexity"][str(packed)]
    assert ours["value"] == pytest.approx(theirs["wikitext"]["word_perplexity,none"], rel=1e-5)
    assert len(ours["per_example"]) == 2
    for kind in ("strict-match", "flexible-extract"):
        found = parts["gsm8k"][f"exact_match {kind}"][str(packed)]
        assert found["value"] == theirs["gsm8k"][f"exact_match,{kind}"]
        assert found["against_full_precision"]["test"] == "mcnemar"


def test_draws_give_pass_at_k_and_are_kept(config, tmp_path, data_dir):
    pytest.importorskip("lm_eval")
    model = save_tiny(tmp_path / "model", chat=True, max_position_embeddings=1024)
    run(config(model={"checkpoint": str(model)}))
    packed = tmp_path / "run"
    arguments = ("--tasks", "gsm8k", "--task-tokens", "6", "--draws", "2")
    parts = _task(packed, data_dir, *arguments)
    assert {"exact_match flexible-extract avg@2", "exact_match flexible-extract pass@2"} <= set(parts["gsm8k"])
    files = {file.name: file.read_text() for file in (packed / "evaluation").glob("answers-*")}
    assert _task(packed, data_dir, *arguments) == parts
    assert files == {file.name: file.read_text() for file in (packed / "evaluation").glob("answers-*")}
    answered = [json.loads(line)["answer"] for text in files.values() for line in text.splitlines()]
    assert len(answered) == 2 * 2 * 4 and len(set(answered)) > 4  # two models, two seeds, four questions


def test_values_of_an_example_by_metric():
    pytest.importorskip("lm_eval")
    from lfq_lightning.evaluation.task_scores import _one_value, _score

    assert _one_value("word_perplexity", (-12.0, 4)) == 3.0 and _one_value("acc", True) == 1.0
    assert _one_value("perplexity", -2.5) == 2.5 and _one_value("inst_level_strict_acc", [True, False]) == 0.5
    assert _one_value("f1", (1, 0)) is None and _one_value("bleu", ["a", "b"]) is None
    alone = _score({"cola": {"mcc,none": 0.25, "mcc_stderr,none": 0.1}}, "mcc", "none", [(1, 0), (1, 1)], True)
    assert alone.value == 0.25 and alone.per_example == []
    two = {"a": {"perplexity,none": 5.0}, "b": {"perplexity,none": 7.0}}
    pooled = _score(two, "perplexity", "none", [-1.0, -3.0], False)
    assert pooled.value == pytest.approx(math.exp(2)) and pooled.unit == "nats"
    assert _score(two, "f1", "none", [(1, 0)], True) is None


def test_groups_keep_what_they_say_of_their_tasks():
    pytest.importorskip("lm_eval")
    from lfq_lightning.evaluation.task_list import TaskList

    tasks = TaskList(["openllm"], None)
    leaves = dict(tasks._leaves(tasks._manager.task_index["openllm"], {}))
    assert leaves["arc_challenge"]["num_fewshot"] == 25 and leaves["hellaswag"]["num_fewshot"] == 10


def test_pass_at_k_by_enumeration():
    pytest.importorskip("lm_eval")
    from itertools import combinations

    from lfq_lightning.evaluation.task_scores import pass_at_k

    answers = [1, 0, 0, 1, 0]
    for k in (1, 2, 4):
        chosen = list(combinations(answers, k))
        assert pass_at_k(5, 2, k) == pytest.approx(sum(any(c) for c in chosen) / len(chosen))


def test_mistaken_tasks(packed, capsys, tmp_path, data_dir):
    pytest.importorskip("lm_eval")
    quiet = ("eval", str(packed), "--new-tokens", "0", "--tasks")
    assert "'gsm8': did you mean" in fails(capsys, *quiet, "gsm8")
    assert "there is no folder" in fails(capsys, *quiet, "gsm8k", "--data-dir", str(tmp_path / "none"))
    assert "for task ifeval" in fails(capsys, *quiet, "ifeval", "--data-dir", str(data_dir))
    (data_dir / "gsm8k" / "train.jsonl").rename(data_dir / "gsm8k" / "validation.jsonl")
    assert "lacks train" in fails(capsys, *quiet, "gsm8k", "--data-dir", str(data_dir))


def test_config_of_a_run_names_its_model(packed, chat_llama):
    assert yaml.safe_load((packed / "lfq.yaml").read_text())["model"]["checkpoint"] == str(chat_llama)
