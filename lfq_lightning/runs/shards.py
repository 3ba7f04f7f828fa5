"""Shards: what blocks ship, packed and written; read again, to resume, to reuse, or to be trained once more."""

from collections import ChainMap
from functools import partial

import torch
from torch import Tensor

from lfq_lightning.calibration.bench import Bench, Shipped
from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.formats import PackFormat
from lfq_lightning.grids import Grid
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.precision import cast
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.runs.earlier_run import EarlierRun
from lfq_lightning.runs.fingerprint import block_fingerprint
from lfq_lightning.runs.run_folder import RunFolder
from lfq_lightning.runs.spent import Meter
from lfq_lightning.stages import BlockPlan


class Shards:
    """The shards of a run, in their format. Every rank counts them in; the first writes them.

    Args:
        folder: where they lie.
        ranks: of the run.
        dtype: of what stays dense.
        packed: how layers are packed.

    Attributes:
        schemes: of every layer that has shipped packed.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, dtype: torch.dtype, packed: PackFormat) -> None:
        self.folder = folder
        self.ranks = ranks
        self.dtype = dtype
        self.format = packed
        self.schemes: dict[str, Grid] = {}

    def write_outer(self, tensors: dict[str, Tensor], shipped: dict[str, QuantizedTensor]) -> None:
        """Write what is outside the blocks: the `shipped` layers packed, everything else as it is."""
        replaced = {f"{name}.weight" for name in shipped}
        kept = {name: tensor for name, tensor in tensors.items() if name not in replaced}
        for name, quantized in shipped.items():
            kept |= self.format.pack(name, quantized)
            self.schemes[name] = quantized.scheme
        self._write(0, kept)

    def write_block(self, plan: BlockPlan, block: DecoderBlock, shipped: dict[str, QuantizedTensor]) -> None:
        """Write a block, or a part of one: the `shipped` layers packed, everything else as it is."""
        replaced = {f"{name}.weight" for name in shipped}
        dense = {name: tensor for name, tensor in block.tensors().items() if name not in replaced}
        for index, layer in enumerate(block.names, block.first):
            prefix = f"{layer}."
            tensors = {name: cast(t, self.dtype).cpu() for name, t in dense.items() if name.startswith(prefix)}
            for name, quantized in shipped.items():
                if name.startswith(prefix):
                    tensors |= self.format.pack(name, quantized)
                    self.schemes[name] = quantized.scheme
            self._write(index + 1, tensors, again=plan.stage.replaces_shards)

    def shipped(self, plan: BlockPlan, index: int) -> Shipped:
        """Return the weights that this run has shipped of a decoder layer, and the codes of its planned layers."""
        stored = self._read(EarlierRun(self.folder.path, resumes=True), index)
        packed = {layer for layer in map(self.format.packed_name, stored) if layer is not None}
        codes = {name: self.format.unpack(name, stored, self.schemes[name]) for name in plan.layers if name in packed}
        return self.format.dequantize(stored, {name: self.schemes[name] for name in packed}), codes

    def take_over(
        self, earlier: EarlierRun, plans: list[BlockPlan], first: int, fingerprint: str, bench: Bench, meter: Meter
    ) -> tuple[int, str]:
        """Take over an earlier run's blocks from `first` on, as far as plan and weights agree.

        Returns the next block, and the fingerprint of the one before it. Raises UserError if none agrees.
        """
        for plan in plans[first:-1]:
            block = bench.read(plan)
            found = block_fingerprint(fingerprint, plan, block.tensors())
            report = earlier.report(plan.index, found)
            if report is None and plan.index == 0 and not earlier.resumes:
                raise UserError(f"reuse: {earlier.path} did not begin with this model and plan; omit reuse.")
            if report is None:
                return plan.index, fingerprint
            shards = {index + 1: self._read(earlier, index) for index in plan.indices}
            stored = dict(ChainMap(*shards.values()))
            packed = {self.format.packed_name(name) for name in stored}
            schemes = {name: layer.scheme for name, layer in plan.layers.items() if name in packed}
            with bench.forward_only():
                bench.pass_by(block, self.format.dequantize(stored, schemes))
            for (number, tensors), digest in zip(shards.items(), report["shards"].values(), strict=True):
                if earlier.resumes:
                    self.folder.note_shard(number, tensors, digest)
                else:
                    self._write(number, tensors)
            if not earlier.resumes:
                line = report | {"shards": self.folder.checksums(shards), "spent": vars(meter.now())}
                self.ranks.once(partial(self.folder.append_journal, line))
            self.schemes |= schemes
            fingerprint = found
        return plans[-1].index, fingerprint

    def _read(self, run: EarlierRun, index: int) -> dict[str, Tensor]:
        return run.shard(index + 1, self.folder.shards, self.folder.family)

    def _write(self, number: int, tensors: dict[str, Tensor], again: bool = False) -> None:
        self.ranks.once(lambda: self.folder.write_shard(number, tensors, again))
        self.folder.note_shard(number, tensors)
