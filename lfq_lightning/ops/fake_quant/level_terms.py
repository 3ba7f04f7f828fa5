"""LevelTerms: a weight in units of its scale before rounding, as the few terms that the fused kernel knows."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LevelTerms:
    """latent / (scale · exp(log_divisor + row_log_divisor)) + clip(offset, -½, ½) + shift · unit / scale, (O, G, K).

    A term that is None is left out. All fp32; `latent` and `unit` are constants.

    Args:
        latent: (O, G, K), the weight.
        log_divisor: (O, G, K), FlexRound's log S2; comes with row_log_divisor.
        row_log_divisor: (O, 1, 1), FlexRound's log s3.
        offset: (O, G, K), in levels (SignRound's V).
        shift: (O, G, K), in units of `unit` (Block-AP's change of the weight).
        unit: (O, G, 1), comes with `shift`.
    """

    latent: Tensor
    log_divisor: Tensor | None = None
    row_log_divisor: Tensor | None = None
    offset: Tensor | None = None
    shift: Tensor | None = None
    unit: Tensor | None = None
