"""Float32 to a narrower float, to the nearest value or to either neighbour at random.

What training adds to a weight is often less than half the distance of that weight to its bfloat16
neighbours. Rounded to nearest every such weight falls back to what it was; rounded to a neighbour
with the probability that its place between the two says, each is right on average, and a layer
sums over thousands of them (Gupta et al. 2015, arXiv:1502.02551, section 3).
"""

from __future__ import annotations

import mlx.core as mx

from ..config import NEAREST

# Bits of the mantissa, and the exponent below which the steps get no smaller. That of bfloat16 is
# not its true one, -126: there its steps would be numbers that some devices flush to zero.
MANTISSA = {mx.bfloat16: 7, mx.float16: 10}
LEAST_EXPONENT = {mx.bfloat16: -118, mx.float16: -14}
EXPONENT_MASK = 0x7F800000  # of the bits of a float32


def rounded(x: mx.array, dtype: mx.Dtype, how: str, key: mx.array) -> mx.array:
    """Float32 `x` as `dtype`, by one of config.ROUNDINGS; `key` is MLX's random key.

    Values that `dtype` holds stay what they are, whichever way.
    """
    if dtype == mx.float32 or how == NEAREST:
        return x.astype(dtype)
    step = _step(x, dtype)
    below = mx.floor(x / step)
    above = mx.random.uniform(shape=x.shape, key=key) < x / step - below
    return ((below + above) * step).astype(dtype)


def _step(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """The distance between the neighbours of each value in `dtype`, a power of two."""
    power = (mx.view(x, mx.uint32) & EXPONENT_MASK).view(mx.float32)  # the largest up to |x|
    return mx.maximum(power, 2.0 ** LEAST_EXPONENT[dtype]) * 2.0 ** -MANTISSA[dtype]
