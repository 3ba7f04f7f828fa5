"""MemoryEstimate: what each phase of a run holds, from shapes alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from lfq_lightning.calibration.activation_cache import TOKENS_AT_ONCE
from lfq_lightning.data import CalibrationData
from lfq_lightning.models.experts import in_expert
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.optimizers import OPTIMIZERS
from lfq_lightning.peak_memory import resident_bytes
from lfq_lightning.precision import compute_dtype, stream_dtype
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import ClosedFormQuantizer
from lfq_lightning.stages import BlockPlan, LayerPlan

_LOSS_TILES = 3 * 4 * 1024**2  # of the logit loss, which makes no whole logits
_SLACK = {True: 1.1, False: 1.25}  # on a GPU or not: what allocators hold beyond what was asked for
_KNOWN: dict[tuple[str, int, int], tuple[int, int]] = {}  # parameters of quantizers: a mixture has thousands alike
_CUDA_BYTES = 600_000_000  # context, libraries and kernels in a GPU's memory


@dataclass(frozen=True)
class Setting:
    """What a run's memory depends on besides model and plan.

    Args:
        ranks: processes that shard a block.
        on_gpu: blocks run on a GPU, where kernels keep less for the backward pass; streams and outer weights do not
            count there.
        samples: calibration sequences.
        held_out: held-out sequences.
        seq_len: tokens per sequence.
        compute_bytes: of a value in matrix products.
        stream_bytes: of a value in the activation streams.
        shipped: names of embeddings and head that are quantised: their weights that ship are held as well.
    """

    ranks: int
    on_gpu: bool
    samples: int
    held_out: int
    seq_len: int
    compute_bytes: int
    stream_bytes: int
    shipped: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, data: CalibrationData, precision: str, ranks: int, on_gpu: bool, shipped: Iterable[str] = ()
    ) -> "Setting":
        """Return that of a run; its precision is not `auto`."""
        return cls(
            ranks=ranks,
            on_gpu=on_gpu,
            samples=data.num_samples,
            held_out=data.num_held_out,
            seq_len=data.seq_len,
            compute_bytes=compute_dtype(precision).itemsize,
            stream_bytes=stream_dtype(precision).itemsize,
            shipped=frozenset(shipped),
        )


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of the phases of one block, per rank, where blocks run; streams are not in them."""

    read: int
    solve: int
    train: int

    @property
    def peak(self) -> int:
        return max(self.read, self.solve, self.train)


def process_bytes(on_gpu: bool) -> int:
    """Return what a process holds before any weights: on a GPU CUDA itself, on the host the libraries loaded here."""
    return _CUDA_BYTES if on_gpu else resident_bytes()


def state_bytes(plan: BlockPlan, skeleton: ModelSkeleton) -> int:
    """Return the size of the file that a run resumes from in the middle of a block."""
    trained = 0
    for index in plan.indices:
        for name, (o, i) in skeleton.linear_shapes(index).items():
            layer = plan.layers.get(name)
            if layer is not None and layer.learned is not None:
                trained += _parameters(layer, o, i)[0]
    return _kept_in_training(plan, trained)


def outer_bytes(skeleton: ModelSkeleton, shipped: Iterable[str] = ()) -> int:
    """Return the bytes of embedding and head, which every process holds in host memory, and of those that ship."""
    checkpoint = skeleton.checkpoint
    config, width = checkpoint.text_config, checkpoint.dtype.itemsize
    stored = width * config.vocab_size * config.hidden_size * (1 if checkpoint.tied else 2)
    return stored + sum(4 * prod(skeleton.outer_shape(name)) for name in shipped)


def stream_bytes(skeleton: ModelSkeleton, plans: list[BlockPlan], setting: Setting) -> int:
    """Return the bytes of a rank's activation streams, with what objectives and quantizers keep of the teacher."""
    values = (setting.samples + setting.held_out) * setting.seq_len * skeleton.checkpoint.text_config.hidden_size
    kept = max(4 if plan.logit_space else 0 for plan in plans)
    kept += max(setting.stream_bytes if plan.needs_reference else 0 for plan in plans)
    return values * (2 * setting.stream_bytes + kept) // setting.ranks


def block_memory(plan: BlockPlan, skeleton: ModelSkeleton, setting: Setting) -> BlockMemory:
    """Return what a block's phases hold on each rank."""
    shapes = {name: shape for index in plan.indices for name, shape in skeleton.linear_shapes(index).items()}
    config, width = skeleton.checkpoint.text_config, skeleton.checkpoint.dtype.itemsize
    weights = sum(o * i for o, i in shapes.values())
    widest = max(max(shape) for shape in shapes.values())
    block = 0 if plan.stage.from_shards else 4 * weights
    head = setting.compute_bytes * config.vocab_size * config.hidden_size  # for the lens, the targets and the loss
    if skeleton.outer_layers["head"] in setting.shipped:
        head *= 2
    elif not setting.on_gpu and setting.compute_bytes == width:
        head = 0  # the same memory as the outer weights
    here = max(1, setting.samples // setting.ranks // 2)
    tokens = min(max(setting.seq_len, TOKENS_AT_ONCE), here * setting.seq_len)
    forward = tokens * (3 * widest + 6 * config.hidden_size) * max(setting.compute_bytes, setting.stream_bytes)
    read = block + (width * weights // len(plan.indices) if width != 4 and block else 0)
    solve = block + forward + head
    if plan.stage.from_shards:  # a layer at a time: its weights, its codes, and the weights that round to them
        held = sum(_held(plan, shapes)) // setting.ranks + _codes(plan, shapes)
        solve = max(solve, held + 9 * weights // len(plan.indices))
    solved, folded, beside = 0, 0, dict[int, int]()  # what the other experts' stacks hold, observed in the same pass
    for names, layer in _stacks(shapes, plan.solved):
        columns, rows = shapes[names[0]][1], sum(shapes[name][0] for name in names)
        kind = layer.closed_form.cls
        observed = 2 * 4 * columns**2 if kind.needs_inputs else 0
        own = kind.solve_bytes(rows // setting.ranks, columns) if issubclass(kind, ClosedFormQuantizer) else 0
        solved += rows * columns * (5 if layer.learned else 1)
        others = beside.get(columns, 0)
        solve = max(solve, block + solved + others + 4 * rows * columns + max(observed + forward, own))
        if kind.scales_inputs:
            folded += observed + 4 * rows * columns
        if in_expert(names[0]):
            beside[columns] = others + observed + 12 * rows * columns
    solve = max(solve, block + folded + forward)  # scales are searched for all layers at once
    sizes = (read, solve, _train(plan, shapes, setting, head))
    return BlockMemory(*(int(size * _SLACK[setting.on_gpu]) for size in sizes))


def _train(plan: BlockPlan, shapes: dict[str, tuple[int, int]], setting: Setting, head: int) -> int:
    if not plan.learned:
        return 0
    trained, frozen = _held(plan, shapes)
    sizes = [o * i for name, (o, i) in shapes.items() if name in plan.layers and plan.layers[name].learned]
    saved = sum(sizes) * (setting.compute_bytes if setting.on_gpu else 9 + setting.compute_bytes)
    largest = max(sizes)
    width = max(max(shape) for shape in shapes.values())
    tokens = plan.batch_size * setting.seq_len // setting.ranks
    layers = 1 if plan.activation_checkpointing else len(plan.indices)
    if plan.activation_checkpointing:
        saved = 0  # each weight is made again when its gradient is due
    activations = layers * tokens * (5 * width + 12 * min(min(shape) for shape in shapes.values())) * 4
    loss = head + tokens * width * 4 + _LOSS_TILES if plan.logit_space else 0
    # parameters, their best values and their optimizer's state are shared out; a gradient is as large as a parameter
    parameters = _kept_in_training(plan, trained // 4) + frozen
    shared, whole, gradients = parameters // setting.ranks, 0, trained
    if setting.ranks > 1:  # gathered while a layer runs, the next one beside it
        at_once = min(2, len(plan.indices))
        whole = (trained + frozen) * at_once // len(plan.indices)
        gradients = trained if at_once == 1 else trained // setting.ranks + trained // len(plan.indices)
    # gradients grow while what was kept for them shrinks
    backward = max(saved + activations, gradients) + (12 if setting.on_gpu else 24) * largest
    return shared + whole + _codes(plan, shapes) + backward + loss


def _held(plan: BlockPlan, shapes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the bytes of the parameters that a block trains, and of those that it holds beside them."""
    trained = frozen = 0
    for name, (o, i) in shapes.items():
        layer = plan.layers.get(name)
        own = (0, o * i) if layer is None or layer.learned is None else _parameters(layer, o, i)
        trained, frozen = trained + 4 * own[0], frozen + 4 * own[1]
    return trained, frozen


def _codes(plan: BlockPlan, shapes: dict[str, tuple[int, int]]) -> int:
    """Return the bytes of the codes of planned layers that are not trained."""
    return sum(o * i for name, (o, i) in shapes.items() if name in plan.layers and not plan.layers[name].learned)


def _kept_in_training(plan: BlockPlan, trained: int) -> int:
    """Return the bytes of that many trained parameters, their best values and their optimizer's state."""
    return trained * (4 + 4 + OPTIMIZERS[plan.optimizer].state_bytes)


def _stacks(shapes: dict[str, tuple[int, int]], layers: dict[str, LayerPlan]) -> list[tuple[list[str], LayerPlan]]:
    """Return planned layers in stacks that are solved together; which read one tensor is guessed from their shapes."""
    stacks: list[tuple[list[str], LayerPlan]] = []
    for name, layer in layers.items():
        last = stacks[-1] if stacks else None
        if last is not None and last[1] == layer and shapes[last[0][0]][1] == shapes[name][1] and "o_proj" not in name:
            last[0].append(name)
        else:
            stacks.append(([name], layer))
    return stacks


def _parameters(layer: LayerPlan, o: int, i: int) -> tuple[int, int]:
    """Return how many values a layer's quantizer would train and hold frozen, without memory; known ones at once."""
    assert layer.learned is not None
    key = repr(layer), o, i
    if key not in _KNOWN:
        with torch.device("meta"):
            grid = torch.empty(o, i // layer.scheme.group_of(i), 1)
            codes, pair = torch.empty(o, i, dtype=torch.uint8), layer.scheme.stored(grid, grid, torch.float32)
            start = QuantizedTensor(codes, *pair, layer.scheme)
            parameters = list(layer.learned.build(torch.empty(o, i), start).parameters())
        sizes = [sum(p.numel() for p in parameters if p.requires_grad == trained) for trained in (True, False)]
        _KNOWN[key] = sizes[0], sizes[1]
    return _KNOWN[key]
