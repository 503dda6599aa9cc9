"""The verdict of stage 12: each grade and each limit by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from dpo_mlx.config import SmokeConfig
from dpo_mlx.report.verdict import verdict

LIMITS = SmokeConfig(
    max_distinct2_drop=0.25,
    min_self_ended_ratio=0.5,
    max_base_logprob_drop=1.0,
    max_length_ratio=2.0,
    min_sense_ratio=0.5,
    max_copied=0.25,
    max_divergence=0.5,
    min_instructions_ratio=0.75,
    max_choices_drop=0.125,
)


def habits(carried: int, count: int) -> list[dict[str, Any]]:
    """`count` habits, of which the last `carried` carried over."""
    return [
        {
            "name": f"habit {i}",
            "yours": 1.0,
            "base": 0.0,
            "tuned": 0.25,
            "is_share": True,
            "carried": i >= count - carried,
        }
        for i in range(count)
    ]


def way(low: float) -> dict[str, float]:
    return {"value": low + 0.1, "low": low, "high": low + 0.2}


def report(**changes: Any) -> dict[str, Any]:
    """A report at every limit, with a model that is far enough; changed at `section__name__who`."""
    values: dict[str, Any] = {
        "voice": {"way": way(0.8)},
        "fluency": {
            "distinct2": {"base": 1.0, "tuned": 0.75},
            "base_logprob_per_token": {"base": -1.0, "tuned": -2.0, "chosen": -1.5},
            "sense": {"base": 2.0, "tuned": 0.5, "chosen": 1.0},
            "self_ended": {"base": 0.5, "tuned": 0.25},
            "median_tokens": {"base": 7, "tuned": 20, "chosen": 10},
            "copied": {"base": 0.0, "tuned": 0.375, "chosen": 0.125},
        },
        "habits": habits(2, 3),
        "cost": {
            "divergence": {"low": 0.5},
            "instructions": {"base": 0.5, "change": {"high": -0.125}},
            "choices": {"change": {"high": -0.125}},
        },
    }
    for path, value in changes.items():
        *sections, last = path.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return values


WAY, HABITS = "voice__way", "habits"
REPEATS, UNNATURAL = "fluency__distinct2__tuned", "fluency__base_logprob_per_token__tuned"
ENDED, LENGTH = "fluency__self_ended__tuned", "fluency__median_tokens__tuned"
SENSE, COPIED = "fluency__sense__tuned", "fluency__copied__tuned"
DIVERGENCE, INSTRUCTIONS = "cost__divergence__low", "cost__instructions__change__high"
CHOICES = "cost__choices__change__high"


@pytest.mark.parametrize(
    ("changes", "grade", "reasons"),
    [
        ({}, "in your voice", []),
        # The lower end of the interval counts, and most of the habits.
        ({WAY: way(0.79)}, "on the way", []),
        ({HABITS: habits(1, 2)}, "on the way", []),
        ({HABITS: []}, "in your voice", []),  # nothing to count
        ({WAY: way(0.1), HABITS: habits(0, 5)}, "on the way", []),
        ({WAY: way(0.09)}, "unmoved", []),
        ({WAY: way(-0.5)}, "unmoved", []),
        ({WAY: way(math.nan)}, "unmoved", []),
        ({WAY: None}, "not measured", []),
        # Each limit of fluency: at it, and beyond it.
        ({REPEATS: 0.74}, "degenerated", ["max_distinct2_drop"]),
        ({UNNATURAL: -2.1}, "degenerated", ["max_base_logprob_drop"]),
        ({UNNATURAL: -math.inf}, "degenerated", ["max_base_logprob_drop"]),
        ({UNNATURAL: math.nan}, "degenerated", ["max_base_logprob_drop"]),
        # A model may be as unlikely under the base model as your answers.
        (
            {UNNATURAL: -3.0, "fluency__base_logprob_per_token__chosen": -3.0},
            "in your voice",
            [],
        ),
        ({LENGTH: 5}, "in your voice", []),  # half as long, at the limit
        ({LENGTH: 21}, "degenerated", ["max_length_ratio"]),
        ({LENGTH: 4}, "degenerated", ["max_length_ratio"]),
        ({LENGTH: 0}, "degenerated", ["max_length_ratio"]),
        ({ENDED: 0.24}, "degenerated", ["min_self_ended_ratio"]),
        ({ENDED: 0.0, "fluency__self_ended__base": 0.0}, "in your voice", []),
        ({SENSE: 0.49}, "degenerated", ["min_sense_ratio"]),
        # Answers of yours that do not depend on the question ask for nothing.
        ({SENSE: -1.0, "fluency__sense__chosen": 0.04}, "in your voice", []),
        ({COPIED: 0.38}, "degenerated", ["max_copied"]),
        # Each limit of cost, by the better end of its interval.
        ({DIVERGENCE: 0.51}, "costs too much", ["max_divergence"]),
        ({DIVERGENCE: math.nan}, "costs too much", ["max_divergence"]),
        ({INSTRUCTIONS: -0.13}, "costs too much", ["min_instructions_ratio"]),
        ({INSTRUCTIONS: -0.5, "cost__instructions__base": 0.0}, "in your voice", []),
        ({CHOICES: -0.13}, "costs too much", ["max_choices_drop"]),
        # The worst grade counts, and every reason is told.
        ({WAY: way(0.0), DIVERGENCE: 9.0}, "costs too much", ["max_divergence"]),
        (
            {WAY: way(0.0), DIVERGENCE: 9.0, REPEATS: 0.0},
            "degenerated",
            ["max_distinct2_drop", "max_divergence"],
        ),
    ],
)
def test_grades_by_hand(changes: dict[str, Any], grade: str, reasons: list[str]) -> None:
    """A value at its limit is allowed, one beyond it crosses the limit. A model passes when it is
    in your voice or on the way.
    """
    result = verdict(report(**changes), LIMITS)
    assert result["grade"] == grade
    assert [line.split(":")[0] for line in result["reasons"]] == [f"smoke.{r}" for r in reasons]
    assert result["passed"] is (grade in ("in your voice", "on the way"))


def test_on_the_way_says_how_far_and_what_is_missing() -> None:
    """With its interval, and the strongest habit that the tuned answers do not have."""
    summary = verdict(report(voice__way=way(0.3), habits=habits(2, 5)), LIMITS)["summary"]
    assert "40% of the way from the base model's to yours" in summary
    assert "(with 95% confidence 30% to 50%)" in summary
    assert "with 2 of 5 of your habits" in summary
    assert "Missing first of all: habit 0 (you 100%, tuned model 25%)" in summary


def test_a_voice_that_cannot_be_measured_is_told() -> None:
    """It is not called learned, and not blamed on training."""
    assert "cannot be measured" in verdict(report(voice__way=None), LIMITS)["summary"]
