"""The sampler without a sort draws from the distribution of mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from dpo_mlx.config import GenerationConfig
from dpo_mlx.model.sampling import sampler, with_max_tokens
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


def test_the_limit_lets_nearly_all_real_answers_fit() -> None:
    """95 of 100 lengths fit, in steps of 64; a number in the config is taken as it is."""
    lengths = list(range(1, 101))  # the 95th percentile of 1 to 100 is 95.05
    assert with_max_tokens(GenerationConfig(), lengths).max_tokens == 128
    assert with_max_tokens(GenerationConfig(), [64] * 99 + [500]).max_tokens == 64
    assert with_max_tokens(GenerationConfig(max_tokens=7), lengths).max_tokens == 7
