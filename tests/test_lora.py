"""LoRA that rounds its output once: an early change reaches the output, on any base."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from dpo_mlx.model.lora import OnceRoundedLoRA, round_once
from mlx_lm.tuner.lora import LoRALinear

WIDTH, RANK = 128, 4


def layer(base: str, size: float, bias: bool = False, dtype: mx.Dtype = mx.bfloat16) -> Any:
    """Our LoRA layer over a random linear layer; B's entries are about `size`."""
    mx.random.seed(0)
    linear = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
    linear.set_dtype(dtype)
    plain = nn.QuantizedLinear.from_linear(linear, 64, 4) if base == "4-bit" else linear
    adapted = LoRALinear.from_base(plain, RANK)
    adapted.lora_b = size * mx.random.normal(adapted.lora_b.shape)
    round_once(nn.Sequential(adapted))
    assert isinstance(adapted, OnceRoundedLoRA)
    return adapted


def inputs(dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    mx.random.seed(1)
    return mx.random.normal((256, WIDTH)).astype(dtype)


def change(call: Any, adapted: Any) -> mx.array:
    """What the adapter adds to the output, as far as the output's dtype can show it."""
    x, b = inputs(), adapted.lora_b
    with_adapter = call(x).astype(mx.float32)
    adapted.lora_b = mx.zeros_like(b)
    without = call(x).astype(mx.float32)
    adapted.lora_b = b
    return with_adapter - without


def share(shown: mx.array, exact: mx.array) -> float:
    """Share of the exact change that is visible, by projecting on it."""
    return float((shown * exact).sum() / (exact * exact).sum())


@pytest.mark.parametrize("rows", ["all at once", "one by one"])
@pytest.mark.parametrize("base", ["plain", "4-bit"])
def test_a_small_change_reaches_the_output(base: str, rows: str) -> None:
    """F2: after one update at 5e-6 (B's entries are 5e-6), bfloat16 outputs show the whole change
    on average, also of one row alone, for which Metal has a kernel of its own. mlx-lm's layer,
    which rounds twice, hides most of it.
    """
    adapted = layer(base, size=5e-6)
    x = inputs().astype(mx.float32)
    exact = adapted.scale * (x @ adapted.lora_a) @ adapted.lora_b

    def row_by_row(x: mx.array) -> mx.array:
        return mx.concatenate([adapted(row) for row in mx.split(x, len(x))])

    shown = change(adapted if rows == "all at once" else row_by_row, adapted)
    assert share(shown, exact) == pytest.approx(1, abs=0.15)
    twice = change(lambda x: LoRALinear.__call__(adapted, x), adapted)
    assert share(twice, exact) < 0.5, "mlx-lm's layer loses nothing here: the test shows nothing"


@pytest.mark.parametrize("shape", [(4, 1), (1, 1), (2, 3), (256,)])
def test_sequences_of_a_batch_are_rows(shape: tuple[int, ...]) -> None:
    """The same output for [batch, length, width], as sampling has it, as for single rows."""
    adapted = layer("plain", size=0.1, bias=True)
    x = inputs()[: math.prod(shape)]
    rows = mx.concatenate([adapted(row) for row in mx.split(x, len(x))])
    together = adapted(x.reshape(*shape, WIDTH))
    assert together.shape == (*shape, 2 * WIDTH) and together.dtype == mx.bfloat16
    difference = mx.abs(together.reshape(rows.shape) - rows).max()
    assert float(difference) <= 2**-7 * float(mx.abs(rows).max())  # one rounding step


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", ["plain", "4-bit"])
def test_in_float32_it_is_mlx_lm_s_layer(base: str, bias: bool) -> None:
    """Values and gradients of A, B and the input match mlx-lm's where nothing is rounded."""
    adapted, x = layer(base, 0.1, bias, mx.float32), inputs(mx.float32)
    weight = mx.random.normal((256, 2 * WIDTH))

    def results(call: Any) -> list[mx.array]:
        def loss(a: mx.array, b: mx.array, x: mx.array) -> mx.array:
            adapted.lora_a, adapted.lora_b = a, b
            return (call(x) * weight).sum()

        _, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(adapted.lora_a, adapted.lora_b, x)
        return [call(x), *gradients]

    expected = results(lambda x: LoRALinear.__call__(adapted, x))
    for found, wanted in zip(results(adapted), expected, strict=True):
        assert mx.abs(found - wanted).max() <= 1e-5 * mx.abs(wanted).max()


@pytest.mark.parametrize("base", ["plain", "4-bit"])
def test_the_output_keeps_the_dtype(base: str) -> None:
    """The output has the input's dtype, bfloat16 or float32, though the adapters are float32."""
    adapted = layer(base, 0.1)
    assert adapted(inputs()).dtype == mx.bfloat16
    assert adapted(inputs(mx.float32)).dtype == mx.float32
