"""What every kernel that quantizes does to many values: their largest magnitude, and quotients by one scale.

A quotient that is rounded to a code at once takes three operations instead of a division:

    q0 = v * (1 / s)        q = q0 + (v - s * q0) / s, the remainder fused and hence exact but for its last bit

q is the IEEE quotient wherever that can matter. A code changes only where a quotient crosses half of a step; before it
is rounded, q is within 2**-22 of a unit in the last place of the quotient, so only scales within a few such units of
v / (k + 1/2) need a look. All of them, for all 24-bit v and 0 <= k <= 127 (steps of float8 are these, times powers of
two), give the same code: 1.4e10 cases, none of which has even another quotient.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["larger", "largest_magnitude", "quotient"]

# Below, remainders would be subnormal.
LEAST_SCALE = tl.constexpr(2.0**-100)


@triton.jit
def larger(a, b):
    """The larger one, or NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_magnitude(values):
    """Bits of the largest magnitude of a row, as ``row_scale`` takes them; of a NaN if there is one."""
    return tl.reduce(tl.abs(values), 0, larger).to(tl.int32, bitcast=True)


@triton.jit
def quotient(values, scale, COMPILED: tl.constexpr):
    """values / scale for a scalar scale and quotients below 2**22; not COMPILED: the interpreter fuses nothing."""
    if COMPILED:
        if scale > LEAST_SCALE:
            inverse = tl.div_rn(1.0, scale)
            result = values * inverse
            result = tl.fma(tl.fma(-scale, result, values), inverse, result)
        else:
            result = tl.div_rn(values, scale)
    else:
        result = tl.div_rn(values, scale)
    return result
