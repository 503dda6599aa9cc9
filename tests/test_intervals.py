"""The intervals: exact on values worked out by hand, and right about as often as they claim."""

from __future__ import annotations

import numpy as np
import pytest
from dpo_mlx.voice import intervals
from dpo_mlx.voice.intervals import Interval


def test_mean_by_hand():
    """Two questions, 0 and 1: a draw is 0, 1/2 or 1, and a quarter of draws is at each end."""
    assert intervals.mean([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)


def test_equal_values_have_no_width():
    """Every draw gives the same mean."""
    assert intervals.mean([0.25] * 12) == Interval(0.25, 0.25, 0.25)


def test_difference_is_paired():
    """The questions differ much, the sides by 1 on each: pairing takes the questions out."""
    a, b = [1.0, 5.0, 101.0], [0.0, 4.0, 100.0]
    assert intervals.difference(a, b) == Interval(1.0, 1.0, 1.0)
    assert intervals.difference(b, a).value == -1.0


@pytest.mark.parametrize(
    ("tuned", "floor", "ceiling", "value"),
    [
        ([0, 0], [0, 0], [1, 1], 0.0),
        ([1, 1], [0, 0], [1, 1], 1.0),
        ([3, 3], [2, 2], [6, 6], 0.25),
        ([-1, -1], [0, 0], [1, 1], -1.0),
        ([2, 2], [0, 0], [1, 1], 2.0),
        ([3, 3], [4, 4], [0, 0], 0.25),  # less is more
    ],
)
def test_share_of_way_by_hand(tuned, floor, ceiling, value):
    """0 at the floor, 1 at the ceiling, in proportion between and beyond."""
    assert intervals.share_of_way(tuned, floor, ceiling) == Interval(value, value, value)


def test_the_share_is_of_means_and_not_a_mean_of_shares():
    """A question where floor and ceiling are equal has no share of its own, and counts anyway."""
    way = intervals.share_of_way([1, 1, 2] * 5, [0, 1, 0] * 5, [2, 1, 4] * 5)
    assert way is not None and way.value == pytest.approx((4 - 1) / (7 - 1))


def test_the_three_sides_are_drawn_together():
    """Each question has its own level; tuned is at half of the way on every question."""
    level = np.array([0.0, 10.0, 500.0, 3.0])
    assert intervals.share_of_way(level + 1, level, level + 2) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("floor", "ceiling"),
    [
        ([1, 1, 1], [1, 1, 1]),
        ([0, 1, 0, 1], [1, 0, 1, 0]),  # one above on half of the questions
        ([0], [1]),  # one question says nothing about others
        ([0, np.nan], [1, 1]),
    ],
)
def test_no_way_between_a_floor_and_a_ceiling_that_are_alike(floor, ceiling):
    """The caller can say that this cannot be measured; there is no division by nearly 0."""
    assert intervals.share_of_way([0.5] * len(floor), floor, ceiling) is None


@pytest.mark.parametrize("sides", [([], [], []), ([1.0], [1.0, 2.0], [1.0, 2.0])])
def test_bad_sides_are_refused(sides):
    """No question, or one side with fewer."""
    with pytest.raises(ValueError, match="one value per side"):
        intervals.share_of_way(*sides)


def test_same_values_same_interval():
    """A report does not change from one reading to the next."""
    values = np.random.default_rng(3).normal(size=20)
    assert intervals.mean(values) == intervals.mean(values.tolist())


def test_the_interval_holds_the_true_value_about_as_often_as_it_says():
    """Made data, half of the way, 32 questions with levels of their own: 94 of 100 were measured;
    an interval too narrow by a third would hold it 81 times.
    """
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        level = rng.normal(size=32)
        tuned, floor, ceiling = (
            level + middle + rng.normal(scale=0.3, size=32) for middle in (0.5, 0, 1)
        )
        way = intervals.share_of_way(tuned, floor, ceiling)
        assert way is not None
        hits += way.low <= 0.5 <= way.high
    assert 0.88 <= hits / 300 <= 0.99
