"""One fit through all blocks: against a hand-written loop, deterministic, and with Lightning's own features."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from safetensors.torch import load_file, save_file

from docs import method
from lfq_lightning.calibration.activation_cache import ActivationCache
from lfq_lightning.calibration.calibration_module import CalibrationModule
from lfq_lightning.calibration.stream_store import StreamStore
from lfq_lightning.callbacks import BlockCallback
from lfq_lightning.callbacks.block_scheduler import BlockScheduler
from lfq_lightning.data import CalibrationData
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.plan import Rule
from lfq_lightning.token_set import TokenSet
from lfq_lightning.trainer import Trainer
from tests.helpers import shards

FLEXROUND = {"name": "flexround", "bits": 3, "group_size": 16, "init": "gptq"}
STEPS, LR, BATCH = 8, 5e-3, 4
RULES = [
    Rule("last", FLEXROUND, objective="logit_ce", steps=STEPS, lr=LR, batch_size=BATCH),
    Rule(1, {**FLEXROUND, "symmetric": False, "init": "rtn"}, steps=STEPS, lr=LR, batch_size=BATCH),
    Rule("all", {"name": "gptq", "bits": 3, "group_size": 16}),
]
SEED = 3
ONE = Ranks(torch.device("cpu"))


def calibrate(model, text, output, *callbacks, rules=RULES, reuse=None, overwrite=False, seed=SEED, **trainer):
    scheduler = BlockScheduler(rules, str(output), overwrite, reuse)
    data = CalibrationData(str(text), num_samples=12, seq_len=32, num_held_out=5, seed=seed)
    settings = {"accelerator": "cpu", "precision": "32-true", "logger": False, **trainer}
    Trainer(callbacks=[scheduler, *callbacks], **settings).run(CalibrationModule(str(model)), data)
    return scheduler


def test_bit_equal_to_the_plain_loop(llama, text_file, tmp_path):
    calibrate(llama, text_file, tmp_path / "run")
    data = CalibrationData(str(text_file), num_samples=12, seq_len=32, num_held_out=5, seed=SEED)
    ours, expected = shards(tmp_path / "run"), method.calibrate(str(llama), RULES, data)
    assert len(expected) > 3 * 7 * 2
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_batches_by_hand(tmp_path):
    """12 sequences, 4 a batch: one of each of 4 classes, in a permutation of each."""
    tokens = TokenSet(torch.zeros(12, 2, dtype=torch.long), torch.ones(12, 2, dtype=torch.bool))
    store = StreamStore(torch.device("cpu"), tmp_path, 0, 10**9)
    cache = ActivationCache("train", iter(torch.zeros(12, 1, 2, 3)), 3, tokens, ONE, store)
    order, expected = torch.Generator().manual_seed(SEED), []
    while len(expected) < 8 * 4:
        classes = [(torch.randperm(3, generator=order) * 4 + number).tolist() for number in range(4)]
        expected += [row[place] for place in range(3) for row in classes]
    assert cache.shuffled(4, 8, SEED).batches == [expected[i : i + 4] for i in range(0, 32, 4)]
    assert cache.shuffled(4, 8, SEED, skip=3).batches == cache.shuffled(4, 8, SEED).batches[3:]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_same_seed_same_bytes(llama, text_file, tmp_path, precision):
    for run in ("a", "b"):
        calibrate(llama, text_file, tmp_path / run, precision=precision)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) == 4
    for name in files:
        if name not in {"metrics.json", "journal.jsonl"}:  # these hold times
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_training_helps_and_is_reported(llama, text_file, tmp_path):
    calibrate(llama, text_file, tmp_path / "run")
    journal = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [line["index"] for line in journal] == [0, 1, 2]
    assert journal[0]["best_step"] == 0
    for line in journal[1:]:
        assert line["loss_after"] < line["loss_before"]
        assert line["best_step"] > 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["held_out"]) == {"kl", "top1_agreement", "flip_rate", "perplexity", "perplexity_fp"}
    final, before, fp = (metrics[k]["held_out"] for k in ("quantized", "before_last_training", "full_precision"))
    assert metrics["held_out"] == final
    assert 0 < final["kl"] < before["kl"]
    assert fp["kl"] == pytest.approx(0, abs=1e-6)
    assert fp["top1_agreement"] == 1
    assert fp["perplexity"] == fp["perplexity_fp"] == final["perplexity_fp"]
    assert len(metrics["quantized"]["per_sequence"]["kl"]) == 5


class Watcher(BlockCallback):
    def __init__(self):
        self.seen, self.validations, self.rates, self.modes = [], 0, [], set()

    def on_block_end(self, trainer, report):
        self.seen.append((report.index, trainer.global_step))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.modes |= {("held out", quantizer.training) for quantizer in pl_module.current.quantizers()}

    def on_validation_end(self, trainer, pl_module):
        self.validations += 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes |= {("training", quantizer.training) for quantizer in pl_module.current.quantizers()}
        if trainer.optimizers and pl_module.current.plan.learned:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_lightning_features_work_together(llama, text_file, tmp_path):
    watcher = Watcher()
    calibrate(
        llama,
        text_file,
        tmp_path / "run",
        watcher,
        LearningRateMonitor(),
        ModelCheckpoint(dirpath=tmp_path / "ckpt", monitor="held_out/loss"),
        logger=True,
        default_root_dir=str(tmp_path / "logs"),
        enable_checkpointing=True,
        enable_progress_bar=True,
        gradient_clip_val=0.1,
        accumulate_grad_batches=3,
        log_every_n_steps=1,
    )
    assert [index for index, _ in watcher.seen] == [0, 1, 2]
    rates = watcher.rates[::3]  # one optimizer step for three batches
    assert len(rates) == 2 * STEPS
    assert rates[:2] == rates[STEPS : STEPS + 2]  # each block begins a cosine of its own
    assert rates[0] == LR
    assert 0 < rates[STEPS - 1] < 0.1 * LR
    assert watcher.validations >= 9
    assert watcher.modes == {("training", True), ("held out", False)}  # held-out losses are those of what would ship
    assert list((tmp_path / "ckpt").glob("*.ckpt"))
    assert list((tmp_path / "logs").rglob("metrics.csv")) or list((tmp_path / "logs").rglob("events*"))


def test_sanity_checking_does_not_choose(llama, text_file, tmp_path):
    calibrate(llama, text_file, tmp_path / "a")
    calibrate(llama, text_file, tmp_path / "b", num_sanity_val_steps=1)
    a, b = shards(tmp_path / "a"), shards(tmp_path / "b")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_clipping_changes_what_is_learned(llama, text_file, tmp_path):
    calibrate(llama, text_file, tmp_path / "a")
    calibrate(llama, text_file, tmp_path / "b", gradient_clip_val=1e-12)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    assert not torch.equal(shards(tmp_path / "a")[name], shards(tmp_path / "b")[name])


class StopAfter(Callback):
    def __init__(self, batches):
        self.left = batches

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


@pytest.mark.parametrize("how", ["max_time", "callback", "max_steps", "max_epochs"])
def test_a_stopped_run_leaves_shards_and_no_model(llama, text_file, tmp_path, how):
    callbacks = [StopAfter(4)] if how == "callback" else []
    limits = {"max_time": {"max_time": {"seconds": 0}}, "max_steps": {"max_steps": 3}, "max_epochs": {"max_epochs": 1}}
    with pytest.raises(UserError, match="stopped before its last block"):
        calibrate(llama, text_file, tmp_path / "run", *callbacks, **limits.get(how, {}))
    if how != "max_time":  # which stops at once here
        assert (tmp_path / "run" / "model-00002-of-00004.safetensors").is_file()
    assert not (tmp_path / "run" / "config.json").exists()
    assert not list((tmp_path / "run").glob("*.partial"))


def test_blocks_without_a_rule_stay_in_full_precision(llama, text_file, tmp_path):
    rules = [Rule(0, {"name": "rtn", "bits": 8, "group_size": 16})]
    calibrate(llama, text_file, tmp_path / "run", rules=rules)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.up_proj" in config["ignore"]
    assert "model.layers.0.mlp.up_proj" not in config["ignore"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["held_out"]["kl"] < 0.2


AWQ_THEN_FLEXROUND = {"name": "flexround", "bits": 3, "group_size": 16, "init": "awq"}
REUSED = {
    "learned": RULES[1:],
    "dense": [Rule(0, "nf4"), Rule("*.down_proj", "fp"), *RULES],
    "folded": [Rule("all", AWQ_THEN_FLEXROUND, steps=STEPS, batch_size=BATCH)],
    "unmatched": [Rule(1, {"name": "rtn", "bits": 4}), Rule("*.2.*", "rtn")],
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("before", REUSED.values(), ids=REUSED)
def test_reused_blocks_change_no_byte(llama, text_file, tmp_path, before, precision):
    last = Rule("last", FLEXROUND, objective="logit_ce", steps=STEPS, batch_size=BATCH)
    calibrate(llama, text_file, tmp_path / "base", rules=before, precision=precision)
    wanted = [last, *(rule for rule in before if rule.match not in {"last", "*.2.*"})]
    calibrate(llama, text_file, tmp_path / "whole", rules=wanted, precision=precision)
    short = calibrate(
        llama, text_file, tmp_path / "short", rules=wanted, precision=precision, reuse=str(tmp_path / "base")
    )
    assert short.fit.taken == 2
    for name in ("model-00002-of-00004", "model-00003-of-00004", "model-00004-of-00004"):
        files = [tmp_path / run / f"{name}.safetensors" for run in ("whole", "short")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "whole" / "config.json").read_bytes() == (tmp_path / "short" / "config.json").read_bytes()
    journals = [(tmp_path / run / "journal.jsonl").read_text().splitlines() for run in ("whole", "short")]
    fingerprints = [[json.loads(line)["fingerprint"] for line in journal] for journal in journals]
    assert fingerprints[0] == fingerprints[1]


def test_reuse_ends_where_plans_or_weights_differ(llama, text_file, tmp_path):
    calibrate(llama, text_file, tmp_path / "base")
    changed = [RULES[0], Rule(1, {**FLEXROUND, "bits": 4}, steps=STEPS, batch_size=BATCH), RULES[2]]
    assert calibrate(llama, text_file, tmp_path / "a", rules=changed, reuse=str(tmp_path / "base")).fit.taken == 1
    other = tmp_path / "other"
    other.mkdir()
    for file in llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert calibrate(other, text_file, tmp_path / "b", reuse=str(tmp_path / "base")).fit.taken == 1
    with pytest.raises(UserError, match="another seed"):
        calibrate(llama, text_file, tmp_path / "c", seed=SEED + 1, reuse=str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"another trainer.precision \('32-true', now 'bf16-mixed'\)"):
        calibrate(llama, text_file, tmp_path / "c", precision="bf16-mixed", reuse=str(tmp_path / "base"))
    with pytest.raises(UserError, match="is not the folder of a run"):
        calibrate(llama, text_file, tmp_path / "c", reuse=str(llama))
    with pytest.raises(UserError, match="give another output"):
        calibrate(llama, text_file, tmp_path / "base", reuse=str(tmp_path / "base"), overwrite=True)
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="did not begin with this model and plan"):
        calibrate(llama, text_file, tmp_path / "c", rules=RULES[1:2], reuse=str(tmp_path / "base"))
    (tmp_path / "base" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002-of-00004.* cannot be read"):
        calibrate(llama, text_file, tmp_path / "d", reuse=str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16-true"}, "fp32 masters"),
        ({"limit_val_batches": 0}, "limit_val_batches"),
        ({"limit_val_batches": 1}, "limit_val_batches"),
        ({"fast_dev_run": True}, "fast_dev_run"),
        ({"min_epochs": 5}, "min_epochs"),
        ({"strategy": "ddp"}, "strategy to fsdp2"),
        ({"callbacks_": [GradientAccumulationScheduler({0: 1, 1: 4})]}, "accumulate_grad_batches to one number"),
        ({"val_check_interval": 5}, "val_check_interval"),
        ({"reload_dataloaders_every_n_epochs": 0}, "reload_dataloaders"),
        ({"devices": 2}, "do not divide among 2 processes"),
    ],
)
def test_trainers_that_cannot_work(llama, text_file, tmp_path, settings, message):
    callbacks = settings.pop("callbacks_", []) if "callbacks_" in settings else []
    with pytest.raises(UserError, match=message):
        calibrate(llama, text_file, tmp_path / "run", *callbacks, **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["block", "embedding", "activations"])
def test_broken_numbers_are_named(llama, text_file, tmp_path, where):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    name = {"embedding": "model.embed_tokens.weight"}.get(where, "model.layers.1.mlp.down_proj.weight")
    tensors[name][3, 3] = 3e38 if where == "activations" else float("nan")
    if where == "activations":
        tensors[name][:] = 3e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    expected = {"embedding": "embed_tokens.weight holds NaN", "block": "layers.1.mlp.down_proj.weight holds NaN"}
    with pytest.raises(UserError, match=expected.get(where, "block 1: its full-precision activations")):
        calibrate(broken, text_file, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_gptq_may_correct_towards_full_precision(llama, text_file, tmp_path):
    plain, corrected = ({"name": "gptq", "bits": 3, "group_size": 16, **more} for more in ({}, {"correct": 0.5}))
    codes = []
    for name, quantizer in (("plain", plain), ("corrected", corrected)):
        calibrate(llama, text_file, tmp_path / name, rules=[Rule("all", quantizer)])
        shards = [load_file(tmp_path / name / f"model-0000{i}-of-00004.safetensors") for i in (2, 3)]
        codes.append([shard[f"model.layers.{i}.mlp.down_proj.weight_packed"] for i, shard in enumerate(shards)])
    assert not torch.equal(codes[0][0], codes[1][0]) and not torch.equal(codes[0][1], codes[1][1])
    with pytest.raises(UserError, match=r"correct 2\.0 must be between 0 and 1"):
        calibrate(llama, text_file, tmp_path / "bad", rules=[Rule("all", {"name": "gptq", "correct": 2})])
