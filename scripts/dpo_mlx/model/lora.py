"""LoRA with an output that is rounded once (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear


class OnceRoundedLoRA(LoRALinear):
    """y = x W^T + scale (x A) B + bias, rounded to the dtype of x after the sum.

    mlx-lm's layer rounds both terms and then adds them. In bfloat16, y + z equals y as long as z is
    less than half the distance from y to its neighbour. One training update adds less than that, so
    most of an early change never reached the output. Here the matrix product starts from
    scale (x A) B instead of zero, and MLX sums in float32 before it rounds.
    """

    def __call__(self, x: mx.array) -> mx.array:
        update: Any = self.scale * ((self.dropout(x) @ self.lora_a) @ self.lora_b)
        linear = self.linear
        if isinstance(linear, nn.QuantizedLinear):
            # A quantised product cannot start from another value, so compute it in float32.
            return (linear(x.astype(mx.float32)) + update).astype(x.dtype)
        y = _sum_rounded_once(update.astype(x.dtype), x, linear.weight.T)
        return y + linear.bias if "bias" in linear else y


def _sum_rounded_once(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """c [..., N] + a [..., K] @ b [K, N], summed in float32 before it is rounded."""
    # On a CPU, addmm multiplies the sequences of a batch one by one, which made sampling 2.5 times
    # slower. So hand it one matrix.
    added, rows = c.reshape(-1, c.shape[-1]), a.reshape(-1, a.shape[-1])
    if len(rows) == 1:
        # Metal's kernel for a single row rounds a @ b first; its kernel for two rows does not.
        added, rows = mx.repeat(added, 2, axis=0), mx.repeat(rows, 2, axis=0)
    return mx.addmm(added, rows, b)[: c.size // c.shape[-1]].reshape(c.shape)


def round_once(model: nn.Module) -> None:
    """Turn each of the model's LoRALinear layers into a OnceRoundedLoRA."""
    for module in model.modules():
        if type(module) is LoRALinear:
            module.__class__ = OnceRoundedLoRA
