"""Observe: sum what closed-form quantizers need of all sequences, so that the sums do not depend on the ranks."""

from collections.abc import Callable, Iterable

from torch import Tensor

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.errors import UserError
from lfq_lightning.quantizers import ClosedFormQuantizer
from lfq_lightning.registry import plugin_name


def observe_halves(quantizers: Iterable[ClosedFormQuantizer], show: Callable[[int], None], ranks: Ranks) -> None:
    """Let `show(half)` show the quantizers this rank's even (0) and odd (1) sequences, and sum over both and all ranks.

    Floating-point sums depend on their order. Even and odd sequences are summed apart and then added, which is also
    what two ranks do: one and two processes give the same bits.
    """
    for quantizer in quantizers:
        if ranks.size > 1 and not quantizer.statistics():
            raise UserError(
                f"quantizer {plugin_name(type(quantizer))}: it observes inputs, but names no `statistics` to sum over "
                "processes; return its sums from that method, or use one process."
            )
    show(0)
    statistics: list[Tensor] = [tensor for quantizer in quantizers for tensor in quantizer.statistics()]
    even = [tensor.clone() for tensor in statistics]
    for tensor in statistics:
        tensor.zero_()
    show(1)
    for tensor, first in zip(statistics, even, strict=True):
        tensor.add_(first)
    ranks.add(statistics)
