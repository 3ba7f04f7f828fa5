"""What can be packed is counted, what is kept is named: in `lfq inspect` and in the first seconds of a run."""

import pytest

from lfq_lightning.cli import main
from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.coverage import coverage
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import Plan, Rule
from tests.helpers import GPTQ, run, save_tiny

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("gpt_oss"), "gpt_oss", tied=False, **EXPERTS)


def test_counted_by_hand(gpt_oss):
    found = coverage(ModelSkeleton(open_checkpoint(str(gpt_oss))))
    projections = 32 * 32 + 2 * 16 * 32 + 32 * 32
    fused = {"gate_up_proj": 4 * 32 * 96, "down_proj": 4 * 48 * 32}
    assert found.packable == 3 * projections
    for name, size in fused.items():
        assert found.kept[f"model.layers.*.mlp.experts.{name}"] == 3 * size
    assert found.large[:2] == [f"model.layers.*.mlp.experts.{name}" for name in fused]


def test_a_run_says_what_stays(gpt_oss, config, caplog):
    run(config(model={"checkpoint": str(gpt_oss)}, plan=[{"match": "all", "quantizer": GPTQ}]))
    assert "% of its layers' weights stay in full precision" in caplog.text
    assert "no packed model.layers.*.mlp.experts.gate_up_proj" in caplog.text


def test_small_layers_that_groups_do_not_divide_stay(tmp_path, caplog):
    """A large layer is an error, as ever."""
    folder = save_tiny(tmp_path, "youtu", tied=False, intermediate_size=800, q_lora_rank=24)
    skeleton = ModelSkeleton(open_checkpoint(str(folder)))
    (plan, *_) = Plan([Rule("all", {"name": "rtn", "bits": 4, "group_size": 16})]).resolve(skeleton)
    assert set(skeleton.linear_shapes(0)) - set(plan.layers) == {"model.layers.0.self_attn.q_b_proj"}
    assert "3 small layers, such as model.layers.0.self_attn.q_b_proj, stay in full precision" in caplog.text
    with pytest.raises(UserError, match=r"group_size 64 does not divide the 800 inputs of .*down_proj"):
        Plan([Rule("*.down_proj", {"name": "rtn", "bits": 4, "group_size": 64})]).resolve(skeleton)


def test_inspect_of_a_model_that_is_not_packed(llama, gpt_oss, capsys):
    main(["inspect", str(llama)])
    said = capsys.readouterr().out
    assert "type llama, not packed" in said and "3 in model.layers: 3 LlamaDecoderLayer" in said
    main(["inspect", str(gpt_oss)])
    said = capsys.readouterr().out
    assert "lm_head behind model.norm; logits are z of its products z" in said
    assert "model.layers.*.mlp.experts.gate_up_proj (36,864)" in said
