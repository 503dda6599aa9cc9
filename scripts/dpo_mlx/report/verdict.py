"""The verdict: the grade that a reader of the answers would give, and the reasons for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

from ..config import SmokeConfig
from ..voice.habits import HabitResult
from ..voice.intervals import IntervalValues

IN_YOUR_VOICE, ON_THE_WAY, UNMOVED = "in your voice", "on the way", "unmoved"
NOT_MEASURED = "not measured"
DEGENERATED, COSTS_TOO_MUCH = "degenerated", "costs too much"
PASSING = (IN_YOUR_VOICE, ON_THE_WAY)

# What it means to cross a limit of the config.
CROSSED = {
    "smoke.max_distinct2_drop": "The tuned model repeats itself more than the base model does.",
    "smoke.min_self_ended_ratio": (
        "Too many answers of the tuned model run until the length limit cuts them."
    ),
    "smoke.max_base_logprob_drop": (
        "The tuned model's answers are too unlikely under the base model to be fluent."
    ),
    "smoke.max_length_ratio": (
        "The tuned model's answers are much longer or much shorter than yours."
    ),
    "smoke.min_sense_ratio": "The tuned model's answers hardly depend on their questions.",
    "smoke.max_copied": "The tuned model recites your training answers.",
    "smoke.max_divergence": (
        "The tuned model answers unrelated prompts very differently from the base model."
    ),
    "smoke.min_instructions_ratio": (
        "The tuned model follows fewer instructions than the base model does."
    ),
    "smoke.max_choices_drop": "The tuned model gets fewer questions of general knowledge right.",
}

# Answers of yours that fit their question by less, in nats per token, set no measure.
MIN_SENSE = 0.05

# How far a model must be at least, as the lower end of the interval on the voice scale.
MIN_IN_YOUR_VOICE, MIN_ON_THE_WAY = 0.8, 0.1

Report = Mapping[str, Any]


class Verdict(TypedDict):
    """`passed` is whether the grade is one of PASSING. `reasons` has a line for each limit of the
    config that was crossed.
    """

    grade: str
    passed: bool
    summary: str
    reasons: list[str]


def verdict(report: Report, limits: SmokeConfig) -> Verdict:
    """The grade of a model, from the measures in report.json.

    The worst of several grades counts: degenerated, then costs too much. How far the model is on
    the voice scale counts by the lower end of its interval.
    """
    degenerated = _degenerated(report["fluency"], limits)
    expensive = _too_expensive(report["cost"], limits)
    grade = _voice_grade(report["voice"]["way"], report["habits"])
    summary = _voice_summary(grade, report["voice"]["way"], report["habits"])
    reasons = degenerated + expensive
    if reasons:
        grade = DEGENERATED if degenerated else COSTS_TOO_MUCH
        summary = f"{CROSSED[_key(reasons[0])]} {summary}"
    return {
        "grade": grade,
        "passed": grade in PASSING,
        "summary": summary,
        "reasons": reasons,
    }


def _key(reason: str) -> str:
    return reason.partition(":")[0]


def _voice_grade(way: IntervalValues | None, habits: list[HabitResult]) -> str:
    if way is None:
        return NOT_MEASURED
    if not way["low"] >= MIN_ON_THE_WAY:
        return UNMOVED
    has_most_habits = 2 * sum(habit["carried"] for habit in habits) > len(habits) or not habits
    return IN_YOUR_VOICE if way["low"] >= MIN_IN_YOUR_VOICE and has_most_habits else ON_THE_WAY


def _voice_summary(grade: str, way: IntervalValues | None, habits: list[HabitResult]) -> str:
    """How far the model is, and the strongest habit that it lacks."""
    if way is None:
        return (
            "The voice cannot be measured on these questions: your answers and the base model's "
            "are too much alike, or too few."
        )
    sentence = (
        f"The answers are {way['value']:.0%} of the way from the base model's to yours (with 95% "
        f"confidence {way['low']:.0%} to {way['high']:.0%})"
    )
    missing = [habit for habit in habits if not habit["carried"]]
    if habits:
        carried = len(habits) - len(missing)
        sentence += f", with {carried} of {len(habits)} of your habits"
    if missing and grade != IN_YOUR_VOICE:
        sentence += f". Missing first of all: {habit_text(missing[0])}"
    return f"{sentence}."


def habit_text(habit: HabitResult) -> str:
    """A habit with its figures, such as `opens with bold text (you 100%, tuned model 25%)`."""
    spec = ".0%" if habit["is_share"] else ".3g"
    yours, tuned = format(habit["yours"], spec), format(habit["tuned"], spec)
    return f"{habit['name']} (you {yours}, tuned model {tuned})"


def _degenerated(fluency: Report, limits: SmokeConfig) -> list[str]:
    """A line for each limit of fluency that the tuned answers crossed."""
    distinct, log_prob, sense, ended, length, copied = (
        fluency[name]
        for name in (
            "distinct2",
            "base_logprob_per_token",
            "sense",
            "self_ended",
            "median_tokens",
            "copied",
        )
    )
    ratio = max(length["tuned"], 1.0) / length["chosen"]
    # Your answers are unlikely under the base model, so a model that learned the voice may go as
    # far as they do.
    largest_drop = max(limits.max_base_logprob_drop, log_prob["base"] - log_prob["chosen"])
    return [
        *_at_most(
            "smoke.max_distinct2_drop",
            distinct["base"] - distinct["tuned"],
            limits.max_distinct2_drop,
        ),
        *_at_most(
            "smoke.max_base_logprob_drop", log_prob["base"] - log_prob["tuned"], largest_drop
        ),
        *_at_most("smoke.max_length_ratio", max(ratio, 1 / ratio), limits.max_length_ratio),
        *_at_least(
            "smoke.min_self_ended_ratio",
            ended["tuned"] / ended["base"] if ended["base"] else math.inf,
            limits.min_self_ended_ratio,
        ),
        *_at_least(
            "smoke.min_sense_ratio",
            sense["tuned"] / sense["chosen"] if sense["chosen"] >= MIN_SENSE else math.inf,
            limits.min_sense_ratio,
        ),
        *_at_most("smoke.max_copied", copied["tuned"] - copied["chosen"], limits.max_copied),
    ]


def _too_expensive(cost: Report, limits: SmokeConfig) -> list[str]:
    """A line for each limit on what training cost elsewhere, unless chance may explain it: the
    better end of the 95% interval counts.
    """
    instructions, choices = cost["instructions"], cost["choices"]
    followed = instructions["base"] + instructions["change"]["high"]
    return [
        *_at_most("smoke.max_divergence", cost["divergence"]["low"], limits.max_divergence),
        *_at_least(
            "smoke.min_instructions_ratio",
            followed / instructions["base"] if instructions["base"] else math.inf,
            limits.min_instructions_ratio,
        ),
        *_at_most("smoke.max_choices_drop", -choices["change"]["high"], limits.max_choices_drop),
    ]


def _at_most(key: str, value: float, limit: float) -> list[str]:
    """A line when the value is above the limit, or is NaN."""
    return [] if value <= limit else [f"{key}: {value:.3g}, but at most {limit:.3g} is allowed"]


def _at_least(key: str, value: float, limit: float) -> list[str]:
    """A line when the value is below the limit, or is NaN."""
    return [] if value >= limit else [f"{key}: {value:.3g}, but at least {limit:.3g} is required"]
