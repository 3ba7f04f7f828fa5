"""Count the floating-point work of a block's calibration, for the ETA."""

from lfq_lightning.models.experts import chosen_share
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.plan import BlockPlan

_CHECKS = 4  # validations during training, at Lightning's val_check_interval of 0.25


def block_flops(plan: BlockPlan, skeleton: ModelSkeleton, tokens: int, held_out_tokens: int, seq_len: int) -> float:
    """Return the FLOP of calibrating one block: teacher, observing, training, held-out checks, advancing.

    Matrix products only; a few percent of scale searches and attention are left out.
    """
    config = skeleton.checkpoint.config
    share = chosen_share(config)
    shapes = {name: shape for index in plan.indices for name, shape in skeleton.linear_shapes(index).items()}
    forward = sum(2.0 * o * i * share(name) for name, (o, i) in shapes.items())  # per token
    readout = 4.0 * config.hidden_size * config.vocab_size if plan.logit_space else 0.0
    everything = tokens + held_out_tokens
    passes = 1 if plan.whole else 2  # the teacher is there
    work = passes * forward * everything + 2 * forward * held_out_tokens
    if any(layer.closed_form.cls.needs_inputs for layer in plan.solved.values()):
        # each input is summed once, and gate and up of an expert read one; fp32 products count four times
        inputs = {(i, name.rpartition(".")[0] if ".experts." in name else ""): name for name, (_, i) in shapes.items()}
        sums = sum(2.0 * i * i * share(name) for (i, _), name in inputs.items())
        work += tokens * (1.7 * forward + 4 * sums)
    if plan.learned:
        work += plan.steps * plan.batch_size * seq_len * (3 * forward + readout)
        work += _CHECKS * held_out_tokens * (forward + readout)
    return work + readout * everything
