"""Count the work of a block's calibration: what `lfq plan` makes a time of, and a run its ETA."""

import time
from dataclasses import dataclass

from lfq_lightning.models.experts import chosen_share, in_expert
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.planning.memory_estimate import Setting
from lfq_lightning.quantizers import ClosedFormQuantizer
from lfq_lightning.stages import BlockPlan

_CHECKS = 4  # validations during training, at Lightning's val_check_interval of 0.25

# Bytes that all but matrix products read and write, counted operation by operation on Llama's blocks: of a token, in
# units of what enters and leaves the linear layers, fp32; of a trained weight in a step, optimizer included; of a logit
_FORWARD, _STEP = 5, 10
_OF_WEIGHT = {False: 180, True: 56}  # by whether blocks run on a GPU, where rounding is one kernel each way
_OF_LOGIT = {False: 49, True: 16}

_FLOP_PER_BYTE = {False: 10, True: 125}  # in the same time, for an ETA, which measures nothing


@dataclass(frozen=True)
class Work:
    """FLOP of matrix products, and bytes that all other operations read and write."""

    flop: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flop * times, self.bytes * times)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """Return the time at so many FLOP, and so many bytes, a second."""
        return self.flop / rate + self.bytes / bandwidth


def block_work(plan: BlockPlan, skeleton: ModelSkeleton, setting: Setting) -> Work:
    """Return the work of calibrating one block: teacher, observing, solving, training, held-out checks, advancing.

    Attention's products, which grow with the square of the length, are left out.
    """
    config, on_gpu = skeleton.checkpoint.text_config, setting.on_gpu
    tokens, held_out_tokens = setting.samples * setting.seq_len, setting.held_out * setting.seq_len
    fp32 = 4 if setting.compute_bytes < 4 else 1  # what its products cost beside the run's
    share = chosen_share(config)
    shapes = {name: shape for index in plan.indices for name, shape in skeleton.linear_shapes(index).items()}
    products = sum(2.0 * o * i * share(name) for name, (o, i) in shapes.items())  # per token
    width = sum(4.0 * (o + i) * share(name) for name, (o, i) in shapes.items())
    forward, step = Work(products, _FORWARD * width), Work(3 * products, _STEP * width)
    if plan.activation_checkpointing:
        step += forward
    whole_readout = Work(4.0 * config.hidden_size * config.vocab_size, float(_OF_LOGIT[on_gpu] * config.vocab_size))
    readout = whole_readout * plan.logit_space
    everything = tokens + held_out_tokens
    work = whole_readout * held_out_tokens  # the KL behind the block
    work += forward * ((2 if plan.stage.teacher_runs else 1) * everything + 2 * held_out_tokens)
    if any(layer.closed_form.cls.needs_inputs for layer in plan.solved.values()):
        # each input is summed once, and gate and up of an expert read one
        inputs = {(i, name.rpartition(".")[0] if in_expert(name) else ""): name for name, (_, i) in shapes.items()}
        sums = sum(2.0 * i * i * share(name) for (i, _), name in inputs.items())
        work += (forward * 1.7 + Work(fp32 * sums, 0.0)) * (tokens * (2 if plan.needs_reference else 1))
    for name, layer in plan.solved.items():
        kind = layer.closed_form.cls
        if issubclass(kind, ClosedFormQuantizer):
            flop, size = kind.solve_work(*shapes[name])
            work += Work(fp32 * flop, size)
    if plan.learned:
        loss = readout * plan.objective.build().head_share
        trained = sum(o * i for name, (o, i) in shapes.items() if name in plan.layers and plan.layers[name].learned)
        work += (step + loss) * (plan.steps * plan.batch_size * setting.seq_len)
        work += Work(0.0, float(_OF_WEIGHT[on_gpu] * trained)) * plan.steps
        work += (forward + loss) * (_CHECKS * held_out_tokens)
    return work + readout * everything


def seconds_left(
    started: float,
    plans: list[BlockPlan],
    first: int,
    done: int,
    skeleton: ModelSkeleton,
    setting: Setting,
) -> float:
    """Return about how many seconds the blocks after block `done` take, by those from `first` on, begun at `started`.

    `started` is a time of `time.perf_counter`.
    """
    bandwidth = 1 / _FLOP_PER_BYTE[setting.on_gpu]
    work = [block_work(plan, skeleton, setting).seconds(1.0, bandwidth) for plan in plans]
    return (time.perf_counter() - started) * sum(work[done + 1 :]) / sum(work[first : done + 1])
