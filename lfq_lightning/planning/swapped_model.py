"""SwappedModel: what a model loses with some of its layers rounded to nearest, the others in full precision."""

import torch
from torch import Tensor

from lfq_lightning.grids import Grid
from lfq_lightning.models.checkpoints import Checkpoint
from lfq_lightning.models.decoder_block import DecoderBlock
from lfq_lightning.models.model_skeleton import ModelSkeleton
from lfq_lightning.objectives.kl import KL
from lfq_lightning.quantizers.rtn import RTN
from lfq_lightning.token_set import TokenSet

_TOKENS = 1024  # that go through a block at a time


class SwappedModel:
    """A model in fp32, held whole, with the full-precision input of each block for some tokens.

    Args:
        checkpoint: the model.
        tokens: what KL is measured on.
    """

    @torch.no_grad()
    def __init__(self, checkpoint: Checkpoint, tokens: TokenSet) -> None:
        checkpoint.check_finite()
        self._skeleton, self._checkpoint, self._tokens = ModelSkeleton(checkpoint), checkpoint, tokens
        self._inputs = [self._embed()]
        self._blocks = [self._skeleton.block(range(index, index + 1)) for index in range(len(self._skeleton))]
        for block in self._blocks:
            self._inputs.append(self._through(block, self._inputs[-1]))
        self._linears = {name: linear for block in self._blocks for name, linear in block.linears().items()}
        self._block_of = {name: index for index, block in enumerate(self._blocks) for name in block.linears()}
        self._head = self._skeleton.head(torch.float32)
        self._target = KL().target(self._head.readout(self._inputs[-1][tokens.mask]), self._head)

    def layers(self) -> dict[str, Tensor]:
        """Return full name → weight (O, I) of every linear layer of the blocks, in the order of the model."""
        return {name: linear.weight for name, linear in self._linears.items()}

    @torch.no_grad()
    def rounded(self, name: str, grid: Grid) -> Tensor:
        """Return a layer's weight (O, I), rounded to nearest on a grid; `name` may be that of embeddings or head."""
        weight = self.weight(name)
        rtn = RTN(weight, grid.fitted(weight), self._checkpoint.dtype)
        rtn.solve()
        return rtn.export().dequantize().float()

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
            start, hidden = 0, self._embed()
        if self._skeleton.outer_layers["head"] in shipped:
            head = self._skeleton.head(torch.float32)
            target = KL().target(head.teacher().readout(self._inputs[-1][self._tokens.mask]), head.teacher())
        self._skeleton.ship({})
        for block in self._blocks[start:]:
            hidden = self._through(block, hidden)
        return float(KL().token_loss(head.readout(hidden[self._tokens.mask]), target, head).mean())

    @staticmethod
    def _through(block: DecoderBlock, hidden: Tensor) -> Tensor:
        return torch.cat([block(part) for part in hidden.split(max(1, _TOKENS // hidden.shape[1]))])

    def _embed(self) -> Tensor:
        return torch.cat([self._skeleton.embed(row[None], shipped=True) for row in self._tokens.input_ids])
