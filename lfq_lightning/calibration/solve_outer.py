"""Quantise what is outside the blocks: embeddings and head."""

import logging
from functools import partial

from lfq_lightning.calibration.bench import Bench
from lfq_lightning.calibration.observe import observe_halves
from lfq_lightning.models.head import Head
from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import ClosedFormQuantizer
from lfq_lightning.stages import LayerPlan

log = logging.getLogger(__name__)


def solve_outer(bench: Bench, layers: dict[str, LayerPlan]) -> dict[str, QuantizedTensor]:
    """Return the codes of embeddings and head, by full name.

    A head's quantizer that needs inputs sees what the full-precision model gives it, for which the train split's
    student stream runs through all blocks; `bench.ship_outer` puts it back.
    """
    checkpoint, skeleton = bench.skeleton.checkpoint, bench.skeleton
    found: dict[str, QuantizedTensor] = {}
    quantizers: dict[str, ClosedFormQuantizer] = {}
    for name, layer in layers.items():
        weight = checkpoint.tensors([f"{name}.weight"])[f"{name}.weight"].float().to(bench.device)
        quantizer = layer.closed_form.build(weight, layer.scheme.fitted(weight), checkpoint.dtype)
        assert isinstance(quantizer, ClosedFormQuantizer), "the plan has been checked"
        quantizers[name] = quantizer
    watching = [quantizer for quantizer in quantizers.values() if quantizer.needs_inputs]
    with bench.forward_only():
        if watching:
            log.info("head: the full-precision model runs over the calibration data, for what enters its head")
            for index in range(len(skeleton)):
                bench.splits.train.advance_student(
                    skeleton.block(range(index, index + 1)).to(bench.device), bench.device
                )
            observe_halves(watching, partial(_show, watching, bench, bench.head()), bench.ranks)
        for name, quantizer in quantizers.items():
            quantizer.solve()
            found[name] = quantizer.export().to("cpu")
    return found


def _show(quantizers: list[ClosedFormQuantizer], bench: Bench, head: Head, half: int) -> None:
    for hidden, mask in bench.splits.train.student_batches(bench.device, half):
        rows = head.normed(hidden[mask])
        for quantizer in quantizers:
            quantizer.observe(rows)
