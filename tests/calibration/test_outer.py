"""Quantised embeddings and head: the streams, the losses and the metrics are those of the model that ships."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lfq_lightning.cli import main
from lfq_lightning.data import CalibrationData
from lfq_lightning.errors import UserError
from lfq_lightning.grids import GRIDS
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.head import Head
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.objectives import OBJECTIVES
from lfq_lightning.packed.export import export
from lfq_lightning.packed.load_model import load
from lfq_lightning.plan import Plan
from lfq_lightning.quantizers.gptq import GPTQ
from lfq_lightning.quantizers.rtn import RTN
from lfq_lightning.stages import Rule
from tests.helpers import save_tiny

BLOCKS = [
    {
        "match": "last",
        "quantizer": {"name": "flexround", "grid": "q4_0"},
        "objective": "logit_ce",
        "steps": 4,
        "batch_size": 2,
    },
    {"match": "*.o_proj", "quantizer": "fp"},
    {"match": "all", "quantizer": {"name": "gptq", "grid": "q4_0"}},
]
WIDE = {"intermediate_size": 64}
HEAD = {"name": "gptq", "grid": "q5_0"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["logit_ce", "kl", "reverse_kl", "js", "logit_mse", "topk_kl"])
def test_a_loss_through_another_head(name, softcap, temperature):
    """Against the same loss of rows of logits made one head each, in fp64."""
    generator = torch.Generator().manual_seed(0)
    cls = OBJECTIVES.get(name)
    options = {"temperature": temperature} if "temperature" in OBJECTIVES.options(name) else {}
    if (softcap and cls.linear_head_only) or (name == "topk_kl" and softcap):
        pytest.skip("not for a soft-capped head")
    weight, shipped = (torch.randn(50, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(50, generator=generator, dtype=torch.float64)
    norm = torch.nn.LayerNorm(12, dtype=torch.float64)
    head = Head(norm, weight, bias, 0.5, softcap, shipped=shipped)
    teacher, student = (torch.randn(7, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    objective = cls(**options)
    target = objective.target(objective.view(teacher, head.teacher()), head.teacher())
    found = objective.token_loss(objective.view(student, head), target, head)

    def logits(hidden, own):
        z = 0.5 * norm(hidden) @ own.T + bias
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    one = Head(torch.nn.Identity(), torch.eye(50, dtype=torch.float64))  # the logits themselves as hidden states
    z_teacher, z_student = logits(teacher, weight), logits(student, shipped)
    wanted = objective.token_loss(z_student, objective.target(z_teacher, one), one)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_what_is_measured_is_what_ships(name, tied, config, tmp_path):
    model = save_tiny(tmp_path / "model", tied=tied, **WIDE)
    outer = [{"match": "embeddings", "quantizer": {"name": name if tied else "rtn", "grid": "q8_0"}}]
    outer += [] if tied else [{"match": "head", "quantizer": {"name": name, "grid": "q5_0"}}]
    file = config(model={"checkpoint": str(model)}, plan=[*outer, *BLOCKS])
    main(["run", "--config", str(file)])
    checkpoint, content = open_checkpoint(str(model)), yaml.safe_load(file.read_text())
    data = CalibrationData(**{"seed": content["seed_everything"], **content["data"]})
    _, held_out = data.token_sets(checkpoint, torch.device("cpu"))
    ours, _ = load(tmp_path / "run", dequantize=True)
    skeleton = ModelSkeleton(checkpoint)
    head = skeleton.head(torch.float32)
    embeddings = checkpoint.tensors(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert not torch.equal(ours.get_input_embeddings().weight, embeddings)
    assert torch.allclose(ours.get_input_embeddings().weight, embeddings, atol=0.02)
    assert torch.equal(ours.get_output_embeddings().weight, ours.get_input_embeddings().weight) == tied
    hidden = torch.cat([skeleton.embed(row[None]) for row in held_out.input_ids])
    for index in range(len(skeleton)):
        hidden = skeleton.block(range(index, index + 1))(hidden)
    p = head.logits(head.readout(hidden))[held_out.mask].double().log_softmax(-1)
    with torch.no_grad():
        q = ours(held_out.input_ids).logits[held_out.mask].double().log_softmax(-1)
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out"]["kl"]
    assert measured == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    packed, _ = load(tmp_path / "run")
    with torch.no_grad():
        assert torch.allclose(packed(held_out.input_ids).logits, ours(held_out.input_ids).logits, atol=1e-3)
    with pytest.raises(UserError, match="holds no quantised"):
        export(str(tmp_path / "run"), "awq", str(tmp_path / "other"))


def test_gptq_of_a_head_sees_what_enters_it(config, tmp_path):
    """Its codes are those of GPTQ on what transformers' own forward gives the head, the norm's output."""
    model = save_tiny(tmp_path / "model", tied=False, **WIDE)
    file = config(model={"checkpoint": str(model)}, plan=[{"match": "head", "quantizer": HEAD}, *BLOCKS])
    main(["run", "--config", str(file)])
    checkpoint, content = open_checkpoint(str(model)), yaml.safe_load(file.read_text())
    data = CalibrationData(**{"seed": content["seed_everything"], **content["data"]})
    train, _ = data.token_sets(checkpoint, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        rows = theirs.model(train.input_ids).last_hidden_state[train.mask]
        weight = theirs.lm_head.weight.detach()
        gptq = GPTQ(weight, GRIDS.get("q5_0")(), checkpoint.dtype)
        gptq.observe(rows)
        gptq.solve()
        wanted = gptq.export().dequantize()
        shipped = load(tmp_path / "run", dequantize=True)[0].lm_head.weight
    assert float((shipped == wanted).float().mean()) > 0.99  # sums in another order can turn a tie
    plain = RTN(weight, GRIDS.get("q5_0")(), checkpoint.dtype)
    plain.solve()

    def error(quantized):
        return float(((quantized - weight) @ rows.T).norm())

    assert error(shipped) < 0.8 * error(plain.export().dequantize())


def test_resumed_and_reused(config, tmp_path):
    """An interrupted run ends with the same bytes, and its blocks are taken over only under the same embeddings."""
    model = save_tiny(tmp_path / "model", **WIDE)
    rule = {"match": "head", "quantizer": HEAD}
    common = {"model": {"checkpoint": str(model)}}
    main(["run", "--config", str(config(plan=[rule, *BLOCKS], **common))])
    again = {**common, "output": str(tmp_path / "again"), "reuse": str(tmp_path / "run")}
    main(["run", "--config", str(config(plan=[rule, *BLOCKS], **again))])
    files = sorted(file.name for file in (tmp_path / "run").glob("*.safetensors"))
    assert all((tmp_path / "run" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    with pytest.raises(SystemExit):
        main(["run", "--config", str(config(plan=BLOCKS, **again | {"output": str(tmp_path / "third")}))])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "head", "quantizer": {"name": "awq", "grid": "q8_0"}}], "match head takes a closed-form quantizer"),
        ([{"match": "embeddings", "quantizer": "fp"}], "match embeddings takes a closed-form quantizer"),
        (
            [
                {"match": "head", "quantizer": {"name": "rtn", "grid": "q8_0"}},
                {"match": "embeddings", "quantizer": {"name": "rtn", "grid": "q5_0"}},
            ],
            "are one tensor; give one rule",
        ),
        ([{"match": "head", "quantizer": {"name": "rtn", "grid": "q6_k"}}], r"does not divide the 32 inputs .* fits: "),
    ],
)
def test_refusals(rules, message, llama):
    with pytest.raises(UserError, match=message):
        Plan([Rule(**rule) for rule in [*rules, *BLOCKS]]).outer(ModelSkeleton(open_checkpoint(str(llama))))


def test_embeddings_have_no_inputs(tmp_path):
    checkpoint = open_checkpoint(str(save_tiny(tmp_path / "model", tied=False)))
    plan = Plan([Rule("embeddings", {"name": "gptq", "grid": "q8_0"}), *(Rule(**rule) for rule in BLOCKS)])
    with pytest.raises(UserError, match="have tokens for inputs, of which gptq learns nothing"):
        plan.outer(ModelSkeleton(checkpoint))


def test_a_format_without_embeddings(llama):
    rules = [{"match": "head", "quantizer": {"name": "rtn", "bits": 8, "group_size": 16}}]
    plan = Plan([Rule(**rule) for rule in rules])
    with pytest.raises(UserError, match=r"compressed_tensors holds no quantised embeddings, which is the head as well"):
        plan.outer(ModelSkeleton(open_checkpoint(str(llama))))
