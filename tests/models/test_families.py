"""Every family of the table: streamed block by block, quantised, and loaded by transformers."""

import torch
from transformers import AutoModelForCausalLM

from lfq_lightning.cli import main
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.head import Head
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.packed.load_model import load


def test_streamed_logits_are_bit_equal(family_folder):
    input_ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(family_folder)
    with torch.no_grad():
        expected = model(input_ids).logits
        skeleton = ModelSkeleton(open_checkpoint(str(family_folder)))
        hidden = torch.cat([skeleton.embed(row[None]) for row in input_ids])
        for index in range(len(skeleton)):
            hidden = skeleton.block(range(index, index + 1))(hidden)
        head = skeleton.head(torch.float32)
        assert isinstance(head, Head)
        assert torch.allclose(head.logits(head.readout(hidden)), expected, rtol=1e-5, atol=1e-5)


def test_quantised_model_loads_in_transformers(family_folder, config):
    path = config(model={"checkpoint": str(family_folder)})
    main(["run", "--config", str(path)])
    output = path.parent / "run"
    ours, tokenizer = load(output, dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(output)
    inputs = tokenizer("9 bottles", return_tensors="pt")["input_ids"]
    greedy = [m.generate(inputs, do_sample=False, max_new_tokens=20).tolist() for m in (ours, theirs)]
    assert greedy[0] == greedy[1]
    weights = theirs.state_dict()  # dequantised at the first forward
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, _of_experts(weights, name) if ".experts." in name else weights[name]), name
    tied = theirs.get_input_embeddings().weight.data_ptr() == theirs.get_output_embeddings().weight.data_ptr()
    assert tied == theirs.config.tie_word_embeddings


def _of_experts(weights, name):
    """Return an expert's matrix from transformers' tensor of all experts: gate above up in one, down in the other."""
    before, _, after = name.partition(".experts.")
    number, which, _ = after.split(".")
    if which in {"down_proj", "w2"}:
        return weights[f"{before}.experts.down_proj"][int(number)]
    gate, up = weights[f"{before}.experts.gate_up_proj"][int(number)].chunk(2)
    return gate if which in {"gate_proj", "w1"} else up
