"""CacheError: how far a quantised block's keys and values are from full precision's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lfq_lightning.distributed.ranks import Ranks
from lfq_lightning.models.decoder_block import DecoderBlock

_MADE_BY = {"k_proj": "keys", "v_proj": "values"}  # layers by whose name one can tell


class CacheError:
    """Compares what fills the KV cache, on the held-out sequences: the outputs of `k_proj` and `v_proj`.

    The error is Σ 1 - cos² of each channel over tokens, weighed by the channel's energy in full precision: the relative
    squared error that the best factor for each channel leaves. Such factors are no loss: AWQ moves them from one layer
    to the next. Objectives of the model's end may wear the cache (LAQuant); this shows whether one has.

    Args:
        block: its layers as they are now.
        ranks: who has the other sequences.
    """

    def __init__(self, block: DecoderBlock, ranks: Ranks) -> None:
        self.block = block
        self.ranks = ranks
        self._teacher: dict[str, list[Tensor]] = {}

    @contextmanager
    def noting_teacher(self) -> Iterator[None]:
        """Keep what the layers give in the forward passes inside, which are full precision's."""
        with self._listening(self._teacher):
            yield

    @contextmanager
    def comparing_student(self, masks: Sequence[Tensor], into: dict[str, float]) -> Iterator[None]:
        """Compare the forward passes inside, of the same batches, and put `keys` and `values` into a dict.

        Args:
            masks: bool (B, T) of each batch, False at pads.
            into: stays empty if full precision was not noted, or the block has no layers of these names that are called
                once a forward pass, with a row for each token.
        """
        if not self._teacher:
            yield
            return
        student: dict[str, list[Tensor]] = {}
        with self._listening(student):
            yield
        found: dict[str, Tensor] = {}
        for name, wanted in self._teacher.items():
            shapes = [[output.shape[:-1] for output in outputs] for outputs in (wanted, student.get(name, []))]
            if any(side != [mask.shape for mask in masks] for side in shapes):
                continue
            sums = torch.zeros(3, wanted[0].shape[-1], dtype=torch.float64)
            for one, other, mask in zip(wanted, student[name], masks, strict=True):
                a, b = one[mask].double(), other[mask].double()
                sums += torch.stack([(a * a).sum(0), (b * b).sum(0), (a * b).sum(0)])
            sums = sums.to(self.ranks.device)
            self.ranks.add([sums])
            energy, others, product = sums
            apart = energy - product.square() / others.clamp(min=1e-30)
            kind = _MADE_BY[name.rpartition(".")[2]]
            found[kind] = found.get(kind, torch.zeros(2)) + torch.stack([apart.sum(), energy.sum()]).cpu()
        into |= {kind: float(apart / energy.clamp(min=1e-30)) for kind, (apart, energy) in sorted(found.items())}

    @contextmanager
    def _listening(self, heard: dict[str, list[Tensor]]) -> Iterator[None]:
        def listen(name: str, layer: nn.Linear) -> RemovableHandle:
            def hear(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
                heard.setdefault(name, []).append(output.detach().cpu())

            return layer.register_forward_hook(hear)

        layers = {n: layer for n, layer in self.block.linears().items() if n.rpartition(".")[2] in _MADE_BY}
        hooks = [listen(name, layer) for name, layer in layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
