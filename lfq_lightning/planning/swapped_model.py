"""SwappedModel: what a model loses with some of its layers quantised, the others in full precision."""

from functools import cached_property

import torch
from torch import Tensor

from lfq_lightning.calibration.solve import inputs_of
from lfq_lightning.grids import Grid
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.experts import in_expert
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.objectives.kl import KL
from lfq_lightning.quantizers import ClosedFormQuantizer
from lfq_lightning.quantizers.rtn import RTN
from lfq_lightning.registry import Plugin
from lfq_lightning.token_set import TokenSet

_TOKENS = 1024  # that go through a block at a time
_OUTPUTS = 512  # tokens that tell what an error of a weight does to a layer's outputs


class SwappedModel:
    """A model in fp32, held whole, with the full-precision input of each block for some tokens.

    Args:
        checkpoint: the model.
        tokens: what KL is measured on.
        observed: what closed-form quantizers see, in full precision; as long as `tokens`.
    """

    @torch.no_grad()
    def __init__(self, checkpoint: Checkpoint, tokens: TokenSet, observed: TokenSet) -> None:
        checkpoint.check_finite()
        self._skeleton, self._checkpoint, self._observed = ModelSkeleton(checkpoint), checkpoint, observed
        self._embed(tokens)  # captures how blocks are called
        self._blocks = [self._skeleton.block(range(index, index + 1)) for index in range(len(self._skeleton))]
        self._linears = {name: linear for block in self._blocks for name, linear in block.linears().items()}
        self._block_of = {name: index for index, block in enumerate(self._blocks) for name in block.linears()}
        self._head = self._skeleton.head(torch.float32)
        self._rows: dict[str, Tensor] = {}
        self._rows_of: int | None = None
        self.measure_on(tokens)

    @torch.no_grad()
    def measure_on(self, tokens: TokenSet) -> None:
        """Measure KL on these tokens from now on; sequences as long as those before."""
        self._tokens, self._inputs = tokens, self._stream(tokens)
        self._target = KL().target(self._head.readout(self._inputs[-1][tokens.mask]), self._head)

    def layers(self) -> dict[str, Tensor]:
        """Return full name → weight (O, I) of every linear layer of the blocks, in the order of the model."""
        return {name: linear.weight for name, linear in self._linears.items()}

    @torch.no_grad()
    def quantised(self, name: str, grid: Grid, closed_form: Plugin[ClosedFormQuantizer]) -> Tensor:
        """Return a layer's weight (O, I) on a grid; `name` may be that of embeddings or head.

        One that wants inputs gets those of `observed`; what has none, and experts, are rounded to nearest.
        """
        weight = self.weight(name)
        quantizer = closed_form.build(weight, grid.fitted(weight), self._checkpoint.dtype)
        if quantizer.needs_inputs:
            rows = self._inputs_of(name)
            if rows is None:
                quantizer = RTN(weight, grid.fitted(weight), self._checkpoint.dtype)
            else:
                quantizer.observe(rows)
        quantizer.solve()
        return quantizer.export().dequantize().float()

    @torch.no_grad()
    def output_error(self, name: str, weight: Tensor) -> float:
        """Return the sum of squares of what another weight (O, I) does to a layer's outputs, or to itself without."""
        change, rows = weight - self.weight(name), self._inputs_of(name)
        return float((change if rows is None else rows[:: max(1, len(rows) // _OUTPUTS)] @ change.T).square().sum())

    def weight(self, name: str) -> Tensor:
        """Return a layer's weight (O, I), fp32."""
        if name in self._linears:
            return self._linears[name].weight
        return self._checkpoint.tensors([f"{name}.weight"])[f"{name}.weight"].float()

    @torch.no_grad()
    def kl(self, weights: dict[str, Tensor]) -> float:
        """Return the KL to full precision, nats per token, with these weights (O, I) in place of those of layers.

        Embeddings and head may be among them.
        """
        shipped = {name: weight for name, weight in weights.items() if name not in self._linears}
        kept = {name: self._linears[name].weight.clone() for name in weights.keys() - shipped.keys()}
        for name in kept:
            self._linears[name].weight.copy_(weights[name])
        try:
            return self._kl_from(min((self._block_of[name] for name in kept), default=len(self._blocks)), shipped)
        finally:
            for name, weight in kept.items():
                self._linears[name].weight.copy_(weight)

    def _kl_from(self, start: int, shipped: dict[str, Tensor]) -> float:
        self._skeleton.ship(shipped)
        head, target, hidden = self._head, self._target, self._inputs[start]
        if self._skeleton.outer_layers["embeddings"] in shipped:
            start, hidden = 0, self._embed(self._tokens)
        if self._skeleton.outer_layers["head"] in shipped:
            head = self._skeleton.head(torch.float32)
            target = KL().target(head.teacher().readout(self._inputs[-1][self._tokens.mask]), head.teacher())
        self._skeleton.ship({})
        for block in self._blocks[start:]:
            hidden = self._through(block, hidden)
        return float(KL().token_loss(head.readout(hidden[self._tokens.mask]), target, head).mean())

    @cached_property
    def _seen(self) -> list[Tensor]:
        return self._stream(self._observed)

    def _stream(self, tokens: TokenSet) -> list[Tensor]:
        """Return the input of each block (N, T, D), and of the final norm."""
        inputs = [self._embed(tokens)]
        for block in self._blocks:
            inputs.append(self._through(block, inputs[-1]))
        return inputs

    def _inputs_of(self, name: str) -> Tensor | None:
        """Return what enters a layer (tokens, I); None for embeddings that are not the head, and for an expert."""
        mask = self._observed.mask
        if name == self._skeleton.outer_layers["head"]:
            return self._head.normed(self._seen[-1][mask])
        if name not in self._linears or in_expert(name):
            return None
        index = self._block_of[name]
        if self._rows_of != index:
            block = self._blocks[index]
            names = [each for each in block.linears() if not in_expert(each)]
            batch = (self._seen[index], mask)
            rows = next(inputs_of(block, names, lambda _: iter([batch]), half=0))
            self._rows, self._rows_of = dict(zip(names, rows, strict=True)), index
        return self._rows[name]

    @staticmethod
    def _through(block: DecoderBlock, hidden: Tensor) -> Tensor:
        return torch.cat([block(part) for part in hidden.split(max(1, _TOKENS // hidden.shape[1]))])

    def _embed(self, tokens: TokenSet) -> Tensor:
        return torch.cat([self._skeleton.embed(row[None], shipped=True) for row in tokens.input_ids])
