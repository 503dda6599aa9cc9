"""The sampler without a sort draws from the distribution of mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from dpo_mlx.sampling import sampler
from mlx_lm.sample_utils import make_sampler

DRAWS = 40_000


def log_probs() -> mx.array:
    mx.random.seed(0)
    logits = 2 * mx.random.normal((1, 40))
    return mx.repeat(logits - mx.logsumexp(logits, -1, keepdims=True), DRAWS, axis=0)


def shares(tokens: mx.array) -> np.ndarray:
    return np.bincount(np.array(tokens), minlength=40) / DRAWS


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 0.6), (0.7, 1.0), (1.0, 0.2)])
def test_same_distribution(temperature: float, top_p: float) -> None:
    """The same tokens are ever drawn, as often but for chance (5 standard deviations)."""
    found = shares(sampler(temperature, top_p)(log_probs()))
    expected = shares(make_sampler(temp=temperature, top_p=top_p)(log_probs()))
    assert ((found > 0) == (expected > 0))[np.maximum(found, expected) > 1e-3].all()
    assert np.abs(found - expected).max() < 5 * np.sqrt(2 * 0.25 / DRAWS)


def test_zero_is_the_likeliest() -> None:
    """Temperature 0 draws nothing."""
    rows = log_probs()[:3]
    assert sampler(0.0, 0.95)(rows).tolist() == mx.argmax(rows, axis=-1).tolist()
