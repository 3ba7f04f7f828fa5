"""FlexRound: learned rounding by element-wise division."""

import torch
from torch import Tensor, nn

from lfq_lightning.quantized_tensor import QuantizedTensor
from lfq_lightning.quantizers import QUANTIZERS, LearnedQuantizer


class _StraightThrough(torch.autograd.Function):
    """A rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@QUANTIZERS.register
class FlexRound(LearnedQuantizer):
    """FlexRound: Ŵ = s1·(clip(round(W / (s1 ⊙ S2 ⊙ s3)) + z) - z), per channel or group-wise.

    S2 (O, G, K) and s3 (O, 1, 1) are learned in log form from 1, s1 (O, G, 1) as a log factor on the start's scale; so
    training starts exactly at the codes of `init`. s1 is rounded to the dtype that ships inside the graph, the zero
    point z is fixed. With `init: gptq`, W is the error-compensated weight that GPTQ rounds. A clipped weight passes no
    gradient to S2 and s3.

    A division moves large weights far and never lifts a weight that rounds to 0, or changes its sign. An additive offset
    inside the round (AutoRound's, arXiv 2309.05516, section 3) has the opposite property; `offset` learns both.

    Args:
        offset: also learn an offset in [-0.5, 0.5] of a level for each weight.
    """

    paper = "FlexRound (arXiv 2306.00317), section 3"

    def __init__(self, latent: Tensor, start: QuantizedTensor, *, offset: bool = False) -> None:
        super().__init__(latent, start)
        o, _ = latent.shape
        self.start_scale = nn.Parameter(start.scale.float(), requires_grad=False)
        self.zero_point = nn.Parameter(start.zero_point.float(), requires_grad=False)
        self.log_s1 = nn.Parameter(torch.zeros_like(self.start_scale))
        self.log_s2 = nn.Parameter(torch.zeros_like(latent).view(o, start.scale.shape[1], -1))
        self.log_s3 = nn.Parameter(torch.zeros_like(self.start_scale[:, :1]))
        self.offset = nn.Parameter(torch.zeros_like(self.log_s2)) if offset else None

    def forward(self) -> Tensor:
        scale = self._scale()
        return ((self._codes(scale) - self.zero_point) * scale).view_as(self.latent)

    def export(self) -> QuantizedTensor:
        with torch.no_grad():
            scale = self._scale()
            codes = self._codes(scale).to(torch.uint8).view_as(self.latent)
        return QuantizedTensor(codes, scale.to(self.scale_dtype), self.zero_point.to(torch.uint8), self.scheme)

    def _scale(self) -> Tensor:
        scale = self.start_scale * self.log_s1.exp()
        return _StraightThrough.apply(scale, scale.detach().to(self.scale_dtype).float())

    def _codes(self, scale: Tensor) -> Tensor:
        ratio = self.latent.view_as(self.log_s2) / scale * (-self.log_s2 - self.log_s3).exp()
        if self.offset is not None:
            ratio = ratio + self.offset.clamp(-0.5, 0.5)
        return (_StraightThrough.apply(ratio, ratio.detach().round()) + self.zero_point).clamp(0, self.scheme.max_code)
