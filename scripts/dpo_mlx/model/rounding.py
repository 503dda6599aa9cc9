"""Rounds float32 to a narrower float, to nearest or stochastically.

Training often changes a weight by less than half the distance between bfloat16 neighbours. Rounding
to nearest would undo every such change. Stochastic rounding picks the upper neighbour with
probability (x - lower) / (upper - lower). So every weight is right on average, and a layer sums
over thousands of weights (Gupta et al. 2015, arXiv:1502.02551, section 3).
"""

from __future__ import annotations

import mlx.core as mx

from ..config import NEAREST

# Bits of the mantissa, and the exponent below which the steps get no smaller. For bfloat16 that is
# really -126, but some devices flush steps that small to zero.
MANTISSA = {mx.bfloat16: 7, mx.float16: 10}
MIN_EXPONENT = {mx.bfloat16: -118, mx.float16: -14}
EXPONENT_MASK = 0x7F800000  # the exponent's bits in a float32


def round_to(x: mx.array, dtype: mx.Dtype, rounding: str, key: mx.array) -> mx.array:
    """Round float32 `x` to `dtype`. `rounding` is one of config.ROUNDINGS, `key` MLX's random key.

    A value that `dtype` can represent never changes.
    """
    if dtype == mx.float32 or rounding == NEAREST:
        return x.astype(dtype)
    step = _step(x, dtype)
    lower = mx.floor(x / step)
    round_up = mx.random.uniform(shape=x.shape, key=key) < x / step - lower
    return ((lower + round_up) * step).astype(dtype)


def _step(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """The distance between the two `dtype` neighbours of each value, a power of two."""
    power = (mx.view(x, mx.uint32) & EXPONENT_MASK).view(mx.float32)  # largest power <= |x|
    return mx.maximum(power, 2.0 ** MIN_EXPONENT[dtype]) * 2.0 ** -MANTISSA[dtype]
