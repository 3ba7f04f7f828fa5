"""What kernels share: rounding to a grid."""

import triton
import triton.language as tl


@triton.jit
def round_to_grid(levels, zero):
    """Return round(levels) + zero, not yet clipped, halves to even; NaN stays NaN.

    Adding 1.5·2²³ leaves no bits for a fraction, as long as levels are small; those past ±1024 are clipped anyway.
    """
    near = tl.minimum(tl.maximum(levels, -1024.0, tl.PropagateNan.ALL), 1024.0, tl.PropagateNan.ALL)
    return (near + 12582912.0) - 12582912.0 + zero


@triton.jit
def clip_to_codes(code, max_code):
    """Return clip(code, 0, max_code); NaN stays NaN."""
    return tl.minimum(tl.maximum(code, 0.0, tl.PropagateNan.ALL), max_code, tl.PropagateNan.ALL)
