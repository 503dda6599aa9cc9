"""What only shows on Apple's GPU, and what virtual_mac.py assumes about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from dpo_mlx.config import STOCHASTIC, Config
from dpo_mlx.model import device
from dpo_mlx.model.rounding import MANTISSA, MIN_EXPONENT, round_to
from dpo_mlx.stages import selftest
from test_rounding import weights
from test_virtual_mac import (
    LENGTH,
    SCALE,
    attend,
    attend_traced,
    by_hand,
    distance,
    inputs,
    to_bfloat16,
)
from virtual_mac import fused_attention

pytestmark = pytest.mark.metal


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """A tiny Granite in bfloat16, with shapes that use Metal's kernels."""
    return selftest.make_run(tmp_path)


@pytest.mark.parametrize("queries", [1, LENGTH])
def test_attention_rounds_as_emulated(queries: int) -> None:
    """Without gradients, attention is close to one rounding; while gradients are traced, it is
    close to the unfused operations.
    """
    arrays = inputs(mx.bfloat16, queries)
    q, k, v = arrays
    once, stepwise = (
        fused_attention(q, k, v, SCALE, "causal"),
        by_hand(arrays, "causal", to_bfloat16),
    )
    apart = distance(once, stepwise)
    assert distance(attend(arrays), once) < 0.2 * apart
    assert distance(attend_traced(arrays), stepwise) < 0.2 * apart


def test_both_ways_to_score_agree(run: Config) -> None:
    """The reference is scored the way training scores (first-update fault F1)."""
    selftest.check_reference(run)


def test_kernels_of_one_token_agree_with_a_full_pass(run: Config) -> None:
    """Covers mlx-lm's Mamba kernel and MLX's vector attention, alone and in a padded batch."""
    selftest.check_decoding(run)
    selftest.check_batch(run)


def test_the_device_tells_what_is_read() -> None:
    """The memory plan and the machine's name depend on these keys of `mx.device_info`."""
    about = mx.device_info()
    recommended, total = (
        int(about[key]) for key in ("max_recommended_working_set_size", "memory_size")
    )
    assert 10**9 < recommended <= total
    assert device.available() == recommended
    assert isinstance(about["device_name"], str) and isinstance(about["architecture"], str)


def test_limits_are_taken() -> None:
    """Each call returns the previous limit, and accepts what Metal recommends."""
    recommended = int(mx.device_info()["max_recommended_working_set_size"])
    device.limit_memory()
    for set_limit in (mx.set_wired_limit, mx.set_cache_limit, mx.set_memory_limit):
        before = set_limit(recommended)
        assert set_limit(before) == recommended


def test_addmm_rounds_once() -> None:
    """addmm sums c + a @ b in float32. So c, a tenth of a bfloat16 step of the product, moves about
    as many outputs as in exact arithmetic; added to a rounded product it moves almost none.
    """
    mx.random.seed(0)
    a, b = (mx.random.normal((256, 256)).astype(mx.bfloat16) for _ in range(2))
    product = a @ b
    c = (0.1 * 2**-8 * mx.abs(product)).astype(mx.bfloat16)
    exact = [np.array(x.astype(mx.float32), dtype=np.float64) for x in (a, b, c)]
    without, with_c = (to_bfloat16(exact[0] @ exact[1] + part) for part in (0, exact[2]))
    expected = (without != with_c).mean()
    moved = float((mx.addmm(c, a, b) != product).mean())
    assert expected > 0.05
    assert moved == pytest.approx(expected, rel=0.2)
    assert float((product + c != product).mean()) < 0.1 * expected


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_s_bits_are_numpy_s(name: str) -> None:
    """Masking to a power of two and dividing by it are exact on the GPU too: the same draws round
    to the same values as in numpy.
    """
    dtype: Any = getattr(mx, name)
    x, key = weights(), mx.random.key(7)
    draws = np.array(mx.random.uniform(shape=x.shape, key=key))
    values = np.array(x)
    power = (values.view(np.uint32) & 0x7F800000).view(np.float32)
    step = np.maximum(power, np.float32(2.0 ** MIN_EXPONENT[dtype])) * 2.0 ** -MANTISSA[dtype]
    below = np.floor(values / step)
    expected = (below + (draws < values / step - below)) * step
    found = np.array(round_to(x, dtype, STOCHASTIC, key).astype(mx.float32))
    assert np.array_equal(found, expected.astype(np.float32))
