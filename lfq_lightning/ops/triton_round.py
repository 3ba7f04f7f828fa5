"""What kernels share: rounding to a grid."""

import triton
import triton.language as tl


@triton.jit
def round_to_code(levels, zero, most):
    """Return clip(round(levels) + zero, 0, most), halves to even; NaN stays NaN.

    Adding 1.5·2²³ leaves no bits for a fraction, as long as levels are small; those past ±1024 are clipped anyway.
    """
    near = tl.minimum(tl.maximum(levels, -1024.0, tl.PropagateNan.ALL), 1024.0, tl.PropagateNan.ALL)
    code = (near + 12582912.0) - 12582912.0 + zero
    return tl.minimum(tl.maximum(code, 0.0, tl.PropagateNan.ALL), most, tl.PropagateNan.ALL)


@triton.jit
def is_clipped(levels, zero, most):
    """Tell where `round_to_code` clips."""
    near = tl.minimum(tl.maximum(levels, -1024.0), 1024.0)
    code = (near + 12582912.0) - 12582912.0 + zero
    return (code < 0.0) | (code > most)
