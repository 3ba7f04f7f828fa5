"""Sensitivity: each layer against a whole model of transformers, and the widths it proposes."""

import itertools

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lfq_lightning.cli import main
from lfq_lightning.errors import UserError
from lfq_lightning.grids.integer_grid import IntegerGrid
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.planning.sensitivity import LayerSensitivity, measure_sensitivity, propose_widths
from lfq_lightning.quantizers.rtn import RTN
from lfq_lightning.token_set import TokenSet

SCHEMES = [IntegerGrid(2, 16), IntegerGrid(4, 16)]


def test_against_a_whole_model(llama):
    tokens = TokenSet.from_lists([list(range(20)), list(range(50, 62))], 20)
    layers = list(measure_sensitivity(open_checkpoint(str(llama)), tokens, SCHEMES))
    assert len(layers) == 21
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        teacher = model(tokens.input_ids).logits[tokens.mask].log_softmax(-1)
        for layer in layers:
            weight = model.get_submodule(layer.name).weight
            before = weight.clone()
            for scheme in SCHEMES:
                rtn = RTN(before.clone(), scheme, torch.float32)
                rtn.solve()
                weight.copy_(rtn.export().dequantize())
                student = model(tokens.input_ids).logits[tokens.mask].log_softmax(-1)
                expected = float((teacher.exp() * (teacher - student)).sum(-1).mean())
                assert layer.kl[scheme.num_bits] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            weight.copy_(before)


def test_proposed_widths_are_near_the_best_of_all():
    torch.manual_seed(0)
    layers = [
        LayerSensitivity(f"l{i}", 100 * (1 + i % 3), {2: 16 * a, 3: 4 * a, 4: a})
        for i, a in enumerate(torch.rand(7).tolist())
    ]
    total = sum(layer.num_weights for layer in layers)

    def loss(widths):
        return sum(layer.kl[width] for layer, width in zip(layers, widths, strict=True))

    def average(widths):
        return sum(layer.num_weights * width for layer, width in zip(layers, widths, strict=True)) / total

    for wanted in (2.0, 2.5, 3.0, 3.4, 4.0):
        chosen = list(propose_widths(layers, wanted).values())
        best = min(loss(w) for w in itertools.product((2, 3, 4), repeat=7) if average(w) <= wanted + 1e-9)
        assert average(chosen) <= wanted + 1e-9
        assert loss(chosen) <= 1.2 * best
    with pytest.raises(UserError, match="outside the widths 2 … 4"):
        propose_widths(layers, 4.5)


def test_the_command_and_its_plan(llama, text_file, config, tmp_path, capsys):
    output = tmp_path / "plan.yaml"
    arguments = ["--dataset", str(text_file), "--group-size", "16", "--num-samples", "4", "--seq-len", "24"]
    main(["sensitivity", str(llama), *arguments, "--average-bits", "3", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "average 2.9" in printed or "average 3.0" in printed
    rules = yaml.safe_load(output.read_text())["plan"]
    path = config(plan=rules)
    main(["run", "--config", str(path)])
    bits = {group["weights"]["num_bits"] for group in _groups(path.parent / "run")}
    assert len(bits) > 1


def _groups(folder):
    import json

    return json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--average-bits", "1.5"], "1.5 lies outside the widths 2 … 4"),
        (["--average-bits", "3", "--group-size", "7"], "7 does not divide the 32 inputs"),
        (["--average-bits", "3", "--bits", "1", "3"], "outside 2 … 8"),
        (["--average-bits", "3", "--output", "/nowhere/plan.yaml"], "no folder /nowhere"),
        (["--average-bits", "3", "--seq-len", "400"], "longer than the model's context"),
    ],
)
def test_mistakes(llama, text_file, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sensitivity", str(llama), "--dataset", str(text_file), "--seq-len", "24", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_no_bits_are_spent_on_a_higher_kl_and_an_exact_fit_fits():
    assert propose_widths([LayerSensitivity("a", 1000, {2: 0.1, 4: 0.2})], 4) == {"a": 2}
    layers = [LayerSensitivity("a", 300, {2: 0.9, 3: 0.1}), LayerSensitivity("b", 700, {2: 0.9, 3: 0.8})]
    assert propose_widths(layers, 2.3) == {"a": 3, "b": 2}
