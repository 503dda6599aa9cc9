"""Rounding to bfloat16 and float16: to neighbours only, right on average, the same for a seed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from dpo_mlx.config import NEAREST, ROUNDINGS, STOCHASTIC
from dpo_mlx.model.rounding import round_to

TYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}
DRAWS = 4000

types = pytest.mark.parametrize("name", TYPES)


def weights() -> mx.array:
    """As a layer's: around 0.02, some tiny, either sign; and the ends of binades."""
    mx.random.seed(1)
    usual, tiny = 0.02 * mx.random.normal((300,)), 1e-6 * mx.random.normal((100,))
    ends = mx.array([1.0 - 2**-13, 1.0 + 2**-13, -(2.0 - 2**-12), 6.1e-5, 6.10352e-5, 0.0, -0.0])
    return mx.concatenate([usual, tiny, ends])


def neighbours(x: mx.array, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the type around each value, by torch's own arithmetic on its bits."""
    exact = torch.tensor(np.array(x), dtype=torch.float64)
    near = exact.to(getattr(torch, name))
    up, down = (
        torch.nextafter(near, torch.full_like(near, way)) for way in (torch.inf, -torch.inf)
    )
    near, up, down = near.double(), up.double(), down.double()
    return torch.where(near > exact, down, near).numpy(), torch.where(
        near < exact, up, near
    ).numpy()


def draws(x: mx.array, name: str) -> np.ndarray:
    """[DRAWS, len(x)] by as many seeds."""
    keys = mx.random.split(mx.random.key(0), DRAWS)
    made = mx.stack([round_to(x, TYPES[name], STOCHASTIC, key).astype(mx.float32) for key in keys])
    return np.array(made)


@types
def test_right_on_average_and_only_to_neighbours(name):
    """Every draw is one of the two neighbours, and the share of the upper one is the value's place
    between them to 5 standard errors, for usual weights, subnormal ones and the ends of binades.
    """
    x = weights()
    below, above = neighbours(x, name)
    made = draws(x, name)
    assert ((made == below) | (made == above)).all()
    gap = np.where(above > below, above - below, 1.0)
    place = (np.array(x, dtype=np.float64) - below) / gap
    share = (made == above).mean(axis=0) * (above > below)
    assert (np.abs(share - place) <= 5 * np.sqrt(0.25 / DRAWS)).all()
    # Without a bias over all of them either: 400 values, 4000 draws each.
    assert abs((share - place).mean()) < 5 * np.sqrt(0.25 / DRAWS / len(x))


@types
@pytest.mark.parametrize("how", ROUNDINGS)
def test_what_the_type_holds_stays(name, how):
    """Values already of the type, zero among them, come back as they are."""
    exact = weights().astype(TYPES[name])
    found = round_to(exact.astype(mx.float32), TYPES[name], how, mx.random.key(3))
    assert mx.array_equal(found, exact)


@types
def test_small_changes_are_lost_to_nearest_alone(name):
    """A tenth of a step added to each of 10,000 equal weights: nearest returns the weight, and
    stochastically their mean is the sum to 5 standard errors.
    """
    step = 2**-8 if name == "bfloat16" else 2**-11
    x = mx.full((10_000,), 0.5 + 0.1 * step)
    nearest, stochastic = (
        round_to(x, TYPES[name], how, mx.random.key(0)) for how in ROUNDINGS[::-1]
    )
    assert (nearest == 0.5).all()
    found = stochastic.astype(mx.float32).mean().item() - 0.5
    assert found == pytest.approx(0.1 * step, abs=5 * 0.3 * step / 100)


@types
def test_nearest_is_torch_s(name):
    """Halves go to even, as everywhere."""
    x = mx.concatenate([weights(), mx.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11])])
    found = round_to(x, TYPES[name], NEAREST, mx.random.key(0)).astype(mx.float32)
    expected = torch.tensor(np.array(x)).to(getattr(torch, name)).float().numpy()
    assert np.array_equal(np.array(found), expected)


def test_chance_is_the_key_s():
    """One key, one result; another key, another."""
    x, one, other = weights(), mx.random.key(5), mx.random.key(6)
    first, again, third = (round_to(x, mx.bfloat16, STOCHASTIC, key) for key in (one, one, other))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, third)


@pytest.mark.parametrize("how", ROUNDINGS)
def test_float32_needs_no_rounding(how):
    assert mx.array_equal(round_to(weights(), mx.float32, how, mx.random.key(0)), weights())
