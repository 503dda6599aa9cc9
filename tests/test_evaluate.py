"""The verdict of stage 12, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from dpo_mlx.config import FuseConfig, SmokeConfig
from dpo_mlx.stages.evaluate import verdict, voice_gain

LIMITS = SmokeConfig(
    min_voice_share=0.5,
    min_voice_gain=0.25,
    max_distinct2_drop=0.25,
    min_self_ended_ratio=0.5,
    max_base_logprob_drop=1.0,
    max_length_ratio=2.0,
)
FUSE = FuseConfig(min_margin_kept=0.5)


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


def report(**changes: Any) -> dict[str, Any]:
    """A report that is exactly at every limit, changed at `section__name__who`."""
    made: dict[str, Any] = {
        # a quarter of the way from 0 to 1, more voiced on half of the questions
        "voice": {"share": 0.5, "base": 0, "tuned": 0.25, "chosen": 1, "classifier_accuracy": 0.8},
        "fluency": {
            "distinct2": {"base": 1.0, "tuned": 0.75},
            "base_logprob_per_token": {"base": -1.0, "tuned": -2.0, "chosen": -1.5},
            "self_ended": {"base": 0.5, "tuned": 0.25},
            "median_tokens": {"base": 7, "tuned": 20, "chosen": 10},
        },
        "habits": habits(1, 2),
        "fuse": {"margin_kept": 0.5},
    }
    for path, value in changes.items():
        *sections, last = path.split("__")
        place = made
        for section in sections:
            place = place[section]
        place[last] = value
    return made


REPEATS, UNNATURAL = "fluency__distinct2__tuned", "fluency__base_logprob_per_token__tuned"
ENDED, LENGTH = "fluency__self_ended__tuned", "fluency__median_tokens__tuned"
VOICE = "fluency__base_logprob_per_token__chosen"
BASE_ENDED = "fluency__self_ended__base"
SHARE, TUNED, KEPT = "voice__share", "voice__tuned", "fuse__margin_kept"


@pytest.mark.parametrize(
    ("changes", "outcome", "crossed"),
    [
        ({}, "learned", []),
        ({LENGTH: 5}, "learned", []),  # half as long, at the limit
        ({KEPT: None}, "learned", []),  # no margin that fusing could lose
        ({REPEATS: 0.74}, "degenerated", ["max_distinct2_drop"]),
        ({UNNATURAL: -2.1}, "degenerated", ["max_base_logprob_drop"]),
        ({UNNATURAL: -3.0, VOICE: -3.0}, "learned", []),  # no further than your answers
        ({UNNATURAL: -3.1, VOICE: -3.0}, "degenerated", ["max_base_logprob_drop"]),
        ({UNNATURAL: -math.inf}, "degenerated", ["max_base_logprob_drop"]),
        ({UNNATURAL: math.nan}, "degenerated", ["max_base_logprob_drop"]),
        ({LENGTH: 21}, "degenerated", ["max_length_ratio"]),
        ({LENGTH: 4}, "degenerated", ["max_length_ratio"]),
        ({LENGTH: 0}, "degenerated", ["max_length_ratio"]),
        ({ENDED: 0.24}, "degenerated", ["min_self_ended_ratio"]),
        ({ENDED: 0.0, BASE_ENDED: 0.0}, "learned", []),  # no less than nothing
        ({"habits": []}, "learned", []),  # nothing to count
        ({"habits": habits(2, 5)}, "on the way", []),
        ({"habits": habits(3, 5)}, "learned", []),
        ({"habits": habits(0, 5), SHARE: 0.49}, "unmoved", ["min_voice_share"]),
        ({SHARE: 0.49}, "unmoved", ["min_voice_share"]),
        ({TUNED: 0.24}, "unmoved", ["min_voice_gain"]),
        ({KEPT: 0.49}, "lost in fusing", ["min_margin_kept"]),
        ({KEPT: math.nan}, "lost in fusing", ["min_margin_kept"]),
        # the worst of several is the outcome, and all are told
        ({KEPT: 0.0, SHARE: 0.0}, "unmoved", ["min_voice_share", "min_margin_kept"]),
        (
            {KEPT: 0.0, SHARE: 0.0, REPEATS: 0.0},
            "degenerated",
            ["max_distinct2_drop", "min_voice_share", "min_margin_kept"],
        ),
    ],
)
def test_verdict_by_hand(changes: dict[str, Any], outcome: str, crossed: list[str]) -> None:
    """A value at its limit is allowed, one beyond it crosses the limit. Degenerated comes before
    unmoved, and unmoved before lost in fusing. It passes when no limit is crossed.
    """
    found = verdict(report(**changes), LIMITS, FUSE)
    assert found["outcome"] == outcome
    keys = [f"{'fuse' if key == 'min_margin_kept' else 'smoke'}.{key}" for key in crossed]
    assert [line.split(":")[0] for line in found["crossed"]] == keys
    assert found["passed"] is (not crossed)


def test_on_the_way_names_what_is_missing() -> None:
    """How far it is, and the strongest habit that the tuned answers do not have."""
    summary = verdict(report(habits=habits(2, 5)), LIMITS, FUSE)["summary"]
    assert "on the way to your voice: 2 of 5 of your habits carried over" in summary
    assert "habit 0 (you 100%, tuned model 25%)" in summary


def test_an_unsure_classifier_is_told() -> None:
    """Below 80% accuracy the summary says that the voice cannot be measured."""
    sure, unsure = (
        verdict(report(voice__classifier_accuracy=a), LIMITS, FUSE) for a in (0.8, 0.79)
    )
    assert "cannot be measured" not in sure["summary"]
    assert "cannot be measured" in unsure["summary"]


@pytest.mark.parametrize(
    ("base", "tuned", "chosen", "gain"),
    [(0.25, 0.5, 0.75, 0.5), (0.25, 0.0, 0.75, -0.5), (0.5, 0.75, 0.5, 0.0), (0.5, 0.9, 0.4, 0.0)],
)
def test_gain_is_a_share_of_the_way(base: float, tuned: float, chosen: float, gain: float) -> None:
    """The gain is 0 at the base model's score and 1 at your answers'. It is 0 when both are
    equal.
    """
    assert voice_gain({"base": base, "tuned": tuned, "chosen": chosen}) == gain
