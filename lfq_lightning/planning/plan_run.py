"""Plan a run: what it will hold, write and compute, and whether it fits, from config and shapes alone."""

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lfq_lightning.data import CalibrationData
from lfq_lightning.errors import UserError
from lfq_lightning.models.checkpoints import open_checkpoint
from lfq_lightning.models.checkpoints.shape_checkpoint import ShapeCheckpoint
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.models.widen import has_room
from lfq_lightning.ops.path import best_device
from lfq_lightning.peak_memory import host_bytes
from lfq_lightning.plan import Plan
from lfq_lightning.planning.block_work import Work, block_work
from lfq_lightning.planning.choose_grids import largest_grids
from lfq_lightning.planning.memory_estimate import (
    BlockMemory,
    Setting,
    block_memory,
    outer_bytes,
    process_bytes,
    state_bytes,
    stream_bytes,
)
from lfq_lightning.planning.preflight import check_shares, check_training, output_bytes
from lfq_lightning.precision import AUTO, choose_precision, compute_dtype, product_dtype, seconds_of
from lfq_lightning.registry import plugin_name
from lfq_lightning.stages import BlockPlan, LaterStage, Rule

_GPU_RATE = 300e12  # FLOP/s of bf16 products that an H100 sustains in such work; stated, not measured
_GPU_BANDWIDTH = 2.4e12  # bytes/s; likewise
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}  # of the product that tells the rate
_SUM_SIZE = {"cpu": 2**20, "cuda": 2**26}  # of the sum that tells the bandwidth


@dataclass(frozen=True)
class Machine:
    """Where a run is to happen.

    Args:
        nodes: machines.
        devices: processes on each.
        device_bytes: memory of each device; on a CPU, of the machine.
        on_gpu: devices are GPUs.
        rate: FLOP/s of each device's matrix products.
        bandwidth: bytes/s that its other operations read and write.
        rate_source: where the rate is from.
        here: it is this machine.
    """

    nodes: int
    devices: int
    device_bytes: int
    on_gpu: bool
    rate: float
    bandwidth: float
    rate_source: str
    here: bool = False

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices


@dataclass(frozen=True)
class RunPlan:
    """What a run takes; memory is each rank's.

    Args:
        blocks: bytes of the phases of each kind of block.
        later: of those of a later stage, the stage.
        process: bytes before any weights.
        outer: bytes of embedding and head.
        streams: bytes of the activations.
        streams_on_device: how many of them lie on the GPU.
        output: bytes of the result.
        state: bytes of a block's saved training, at most.
        work: of all blocks.
        seconds: of all blocks.
        writing: bytes of the whole model, if it writes its own calibration data; else 0.
    """

    blocks: dict[str, BlockMemory]
    later: dict[str, str]
    process: int
    outer: int
    streams: int
    streams_on_device: int
    output: int
    state: int
    work: Work
    seconds: float
    writing: int

    @property
    def device_peak(self) -> int:
        """Return the most memory a GPU holds."""
        calibrating = max(block.peak for block in self.blocks.values()) + self.streams_on_device
        return max(calibrating, self.writing) + self.process

    @property
    def cpu_peak(self) -> int:
        """Return the most memory a process holds whose blocks run on the CPU."""
        calibrating = max(block.peak for block in self.blocks.values()) + self.outer + self.streams
        return max(calibrating, self.writing) + self.process


def parse_machine(
    gpus: str | None,
    nodes: int,
    tflops: float | None,
    precision: str,
    accelerator: str = "auto",
    devices: list[int] | str | int | None = None,
) -> Machine:
    """Read `8x80GB`; for None take what a run with that accelerator and devices would use here. Raises UserError."""
    if nodes < 1:
        raise UserError(f"--nodes: {nodes} must be at least 1.")
    if tflops is not None and not tflops > 0:
        raise UserError(f"--tflops: {tflops} must be positive.")
    if gpus is None:
        device = best_device() if accelerator in ("auto", "gpu", "cuda") else torch.device("cpu")
        on_gpu = device.type == "cuda"
        size = torch.cuda.get_device_properties(device).total_memory if on_gpu else host_bytes()
        count, bandwidth = _count(devices) if on_gpu else 1, _measured_bandwidth(device)
        if tflops:
            return Machine(nodes, count, size, on_gpu, tflops * 1e12, bandwidth, "stated", here=True)
        rate = _measured_rate(choose_precision(precision, device.type), device)
        return Machine(nodes, count, size, on_gpu, rate, bandwidth, "measured here", here=True)
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*GB", gpus, re.IGNORECASE)
    if match is None or match[1] == "0":
        raise UserError(f"--gpus: {gpus!r} is not understood; write the number and memory of a node's GPUs, as 8x80GB.")
    rate = tflops * 1e12 if tflops else _GPU_RATE
    return Machine(nodes, int(match[1] or 1), int(float(match[2]) * 1e9), True, rate, _GPU_BANDWIDTH, "stated")


def plan_config(config: Namespace, machine: Machine) -> RunPlan:
    """Return what the run of a config (`run.read_config`) takes on each rank. Raises UserError, as `plan_run`."""
    rules = [Rule(**rule.as_dict()) for rule in config.plan]
    data = CalibrationData(**config.data.as_dict())
    chosen = config.size is not None or config.average_bits is not None
    return plan_run(config.model.checkpoint, rules, data, config.trainer.precision, machine, chosen)


def plan_run(
    model: str, rules: list[Rule], data: CalibrationData, precision: str, machine: Machine, chosen: bool = False
) -> RunPlan:
    """Return what a run takes on each rank; of grids that the run has `chosen` for a size, the largest that may be.

    Raises UserError for what `lfq run` would refuse.
    """
    precision = _planned(precision, machine)
    checkpoint = open_checkpoint(model) if model.endswith(".gguf") else ShapeCheckpoint(model)
    skeleton = ModelSkeleton(checkpoint)
    parsed = Plan(largest_grids(rules, skeleton) if chosen else rules)
    plans = parsed.resolve(skeleton)
    data.check_sizes(checkpoint)
    check_shares(machine.ranks, data)
    check_training(machine.ranks, plans)
    outer = parsed.outer(skeleton)
    setting = Setting.of(data, precision, machine.ranks, machine.on_gpu, outer)
    different: dict[str, list[BlockPlan]] = {}
    for plan in plans:
        different.setdefault(_kind(plan), []).append(plan)
    blocks = {_range(same): block_memory(same[0], skeleton, setting) for same in different.values()}
    work = sum((block_work(plan, skeleton, setting) for plan in plans), start=Work(0.0, 0.0))
    streams = stream_bytes(skeleton, plans, setting)
    return RunPlan(
        blocks=blocks,
        later={
            _range(same): plugin_name(type(same[0].stage))
            for same in different.values()
            if isinstance(same[0].stage, LaterStage)
        },
        process=process_bytes(machine.on_gpu),
        outer=outer_bytes(skeleton, outer),
        streams=streams,
        streams_on_device=min(streams, data.budgets(machine.devices)[0]) if machine.on_gpu else 0,
        output=output_bytes(skeleton, plans, outer),
        state=max(state_bytes(same[0], skeleton) for same in different.values()),
        work=work,
        seconds=work.seconds(machine.rate, machine.bandwidth) / machine.ranks,
        writing=_all_weights(skeleton, machine.on_gpu) if data.generated else 0,
    )


def _planned(precision: str, machine: Machine) -> str:
    """Return what `auto` will be where the run is to happen: here, or on GPUs that are taken to multiply in bf16."""
    if precision == AUTO and machine.on_gpu and not machine.here:
        return "bf16-mixed"
    return choose_precision(precision, "gpu" if machine.on_gpu else "cpu")


def _count(devices: list[int] | str | int | None) -> int:
    """Return how many GPUs `trainer.devices` names; one if it is not said."""
    if isinstance(devices, list):
        return len(devices)
    return torch.cuda.device_count() if devices in ("auto", -1, "-1") else int(devices or 1)


def _all_weights(skeleton: ModelSkeleton, on_gpu: bool) -> int:
    """Return the bytes of the whole model in the dtype that it runs in."""
    values = sum(o * i for index in range(len(skeleton)) for o, i in skeleton.linear_shapes(index).values())
    stored = skeleton.checkpoint.dtype
    runs_in = stored if on_gpu else product_dtype(stored, torch.device("cpu"))
    whole = values * stored.itemsize + outer_bytes(skeleton)
    wide = whole * runs_in.itemsize // stored.itemsize
    return wide if on_gpu or has_room(wide) else whole  # else it is widened tile by tile


def print_plan(model: str, plan: RunPlan, machine: Machine) -> bool:
    """Print a plan; return whether it fits."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    where = f"{machine.devices} GPU(s) of {_gb(machine.device_bytes)}" if machine.on_gpu else "this machine's CPU"
    nodes = f"{machine.nodes} x " if machine.nodes > 1 else ""
    console.print(f"{model} on {nodes}{where}: {machine.ranks} process(es)")
    table = Table(title="memory of each process" + (", on its GPU" if machine.on_gpu else ""), title_justify="left")
    for column in ("blocks", "reading", "solving", "training"):
        table.add_column(column, justify="left" if column == "blocks" else "right")
    for name, block in plan.blocks.items():
        table.add_row(name, _gb(block.read), _gb(block.solve), _gb(block.train) if block.train else "-")
    console.print(table)
    if plan.writing:
        console.print(f"before: the whole model writes the calibration data, {_gb(plan.writing)} of weights")
    held = plan.device_peak if machine.on_gpu else plan.cpu_peak
    streams = f"activations {_gb(plan.streams)}"
    if machine.on_gpu:
        console.print(
            f"host memory of each process: embedding and head {_gb(plan.outer)}, {streams}"
            f" ({_gb(plan.streams_on_device)} of it on the GPU)"
        )
        console.print(
            f"with {_gb(plan.process)} for CUDA, the most at once: {_gb(held)} of {_gb(machine.device_bytes)}"
        )
    else:
        console.print(
            f"beside them: process {_gb(plan.process)}, embedding and head {_gb(plan.outer)}, {streams}; the most at "
            f"once: {_gb(held)} of {_gb(machine.device_bytes)}"
        )
    console.print(f"disk: result {_gb(plan.output)}, a block's saved training up to {_gb(plan.state)}")
    console.print(
        f"work: {plan.work.flop:.2e} FLOP, {plan.work.bytes:.2e} bytes beside them; about {_time(plan.seconds)} at "
        f"{machine.rate / 1e12:.3g} TFLOP/s ({machine.rate_source}; --tflops states another) and "
        f"{machine.bandwidth / 1e9:.3g} GB/s a process"
    )
    fits = held <= machine.device_bytes
    console.print("it fits" if fits else f"it does not fit: {_cure(plan, machine)}")
    return fits


def _cure(plan: RunPlan, machine: Machine) -> str:
    if plan.writing + plan.process > machine.device_bytes:
        return "the whole model cannot write its own calibration data here; give data.dataset."
    name, worst = max(plan.blocks.items(), key=lambda item: item[1].peak)
    if name in plan.later:
        return f"the last stage is the largest; omit the rule `match: {plan.later[name]}`."
    if worst.train < worst.peak:
        return "solving in closed form is the largest; use more processes, or `rtn` as init."
    ways = ["activation_checkpointing: true", "flexround with a `rank`", "more processes"]
    if machine.ranks == 1:
        ways.insert(1, "optimizer: adamw8bit")
    return f"training is the largest; try {', '.join(ways)}."


def _kind(plan: BlockPlan) -> str:
    rules = [(name.partition(f".{plan.index}.")[2] or name, repr(layer)) for name, layer in plan.layers.items()]
    return repr((len(plan.indices), sorted(rules), plan.objective, plan.batch_size, plan.optimizer, plan.learned))


def _range(same: list[BlockPlan]) -> str:
    indices = [index for plan in same for index in plan.indices]
    span = f"{indices[0]} … {indices[-1]}" if len(indices) > 1 else str(indices[0])
    span = same[0].stage.title or span
    quantizers = sorted({(layer.learned or layer.closed_form).name for layer in same[0].layers.values()})
    return f"{span}  {'+'.join(quantizers) or 'full precision'}  {same[0].objective.name}"


def _measured_rate(precision: str, device: torch.device) -> float:
    size, dtype = _PRODUCT_SIZE[device.type], compute_dtype(precision)
    one, other = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * size**3 / _seconds(lambda: one @ other, device)


def _measured_bandwidth(device: torch.device) -> float:
    one, other = (torch.randn(_SUM_SIZE[device.type], device=device) for _ in range(2))
    return 3.0 * one.nbytes / _seconds(lambda: one + other, device)


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Return the median time of seven calls, after one that does not count."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return statistics.median([seconds_of(finished) for _ in range(8)][1:])


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
