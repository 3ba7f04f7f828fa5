"""Count the floating-point work of a block's calibration, for the ETA."""

import time

from lfq_lightning.data import CalibrationData
from lfq_lightning.models.experts import chosen_share, in_expert
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.stages import BlockPlan

_CHECKS = 4  # validations during training, at Lightning's val_check_interval of 0.25


def block_flops(plan: BlockPlan, skeleton: ModelSkeleton, tokens: int, held_out_tokens: int, seq_len: int) -> float:
    """Return the FLOP of calibrating one block: teacher, observing, training, held-out checks, advancing.

    Matrix products only; a few percent of scale searches and attention are left out.
    """
    config = skeleton.checkpoint.text_config
    share = chosen_share(config)
    shapes = {name: shape for index in plan.indices for name, shape in skeleton.linear_shapes(index).items()}
    forward = sum(2.0 * o * i * share(name) for name, (o, i) in shapes.items())  # per token
    readout = 4.0 * config.hidden_size * config.vocab_size if plan.logit_space else 0.0
    everything = tokens + held_out_tokens
    passes = 2 if plan.stage.teacher_runs else 1
    work = passes * forward * everything + 2 * forward * held_out_tokens
    if any(layer.closed_form.cls.needs_inputs for layer in plan.solved.values()):
        # each input is summed once, and gate and up of an expert read one; fp32 products count four times
        inputs = {(i, name.rpartition(".")[0] if in_expert(name) else ""): name for name, (_, i) in shapes.items()}
        sums = sum(2.0 * i * i * share(name) for (i, _), name in inputs.items())
        work += tokens * (1.7 * forward + 4 * sums)
    if plan.learned:
        step = readout * plan.objective.build().head_share
        work += plan.steps * plan.batch_size * seq_len * (3 * forward + step)
        work += _CHECKS * held_out_tokens * (forward + step)
    return work + readout * everything


def seconds_left(
    started: float, plans: list[BlockPlan], first: int, done: int, skeleton: ModelSkeleton, data: CalibrationData
) -> float:
    """Return about how many seconds the blocks after block `done` take, by those from `first` on, begun at `started`.

    `started` is a time of `time.perf_counter`.
    """
    tokens, held_out = data.num_samples * data.seq_len, data.num_held_out * data.seq_len
    work = [block_flops(plan, skeleton, tokens, held_out, data.seq_len) for plan in plans]
    return (time.perf_counter() - started) * sum(work[done + 1 :]) / sum(work[first : done + 1])
