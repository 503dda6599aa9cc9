"""The sections of report.json that compare answers: the base model's, the tuned model's, yours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from ..data.pairs import Pair
from ..files.results import Measures, Outcome
from ..model.sampling import Answer
from ..training.outcome import voice_gain
from ..voice import detector, intervals
from ..voice.answers import Author
from ..voice.copying import copied_share, runs
from ..voice.habits import HabitResult, measure_habits
from ..voice.intervals import Interval, IntervalValues

# Models learn a voice under one system message. This many questions are also asked under another.
OTHER_SYSTEM_MESSAGE = "Answer the user's question."
OTHER_SYSTEM_QUESTIONS = 8

# What each set of answers is called in report.json.
BASE, TUNED, CHOSEN = "base", "tuned", "chosen"
Answers = Mapping[str, Sequence[Answer]]


class DetectionValues(TypedDict):
    """How often a classifier tells a model's answers from yours: 0.5 means that it cannot.

    `p_value` is how often chance alone tells the tuned answers as well. `calibration` is the
    accuracy on your answers against other answers of yours.
    """

    base: IntervalValues
    tuned: IntervalValues
    p_value: float
    calibration: float


class Voice(TypedDict):
    """`way` is how far the tuned answers are from the base model's (0) to yours (1), None when that
    cannot be measured; `other_system_message` the same under another system message, None when
    the chat template has none.
    """

    way: IntervalValues | None
    other_system_message: IntervalValues | None
    detection: DetectionValues | None


class DpoAdded(TypedDict):
    """The means of the evaluations at the end of SFT and after DPO, and the difference of their
    voice, question by question. DPO's evaluation is the kept one or, if SFT's model was kept, its
    last.
    """

    end_of_sft: dict[str, float]
    dpo: dict[str, float]
    voice: IntervalValues


def voice(
    author: Author, train: Sequence[Pair], answers: Answers, other: Sequence[Answer] | None
) -> Voice:
    """The voice of the tuned answers. `other` are those under another system message, to the first
    questions.
    """
    evidence = {who: author.scale.signature.evidence(texts(a)) for who, a in answers.items()}
    under_other = None
    if other is not None:
        count = len(other)
        under_other = intervals.share_of_way(
            author.scale.signature.evidence(texts(other)),
            evidence[BASE][:count],
            evidence[CHOSEN][:count],
        )
    way = intervals.share_of_way(evidence[TUNED], evidence[BASE], evidence[CHOSEN])
    return {
        "way": _values(way),
        "other_system_message": _values(under_other),
        "detection": _detection(train, answers),
    }


def _values(interval: Interval | None) -> IntervalValues | None:
    return None if interval is None else interval.values


def _detection(train: Sequence[Pair], answers: Answers) -> DetectionValues | None:
    """None with too few answers to try."""
    real = texts(answers[CHOSEN])
    all_real = [*real, *(pair.chosen for pair in train)]
    if len(real) < 2 or len(all_real) < 4:
        return None
    base, tuned = (detector.detect(texts(answers[who]), real) for who in (BASE, TUNED))
    return {
        "base": base.accuracy.values,
        "tuned": tuned.accuracy.values,
        "p_value": tuned.p_value,
        "calibration": detector.real_against_real(all_real, len(real)),
    }


def fluency(
    measures: Mapping[str, Measures], train: Sequence[Pair], answers: Answers
) -> dict[str, dict[str, float]]:
    """The means of the three sets of answers by measure, and the share copied from train pairs."""
    training_runs = set(runs(pair.chosen for pair in train))
    by_name = {
        name: {who: of.means[name] for who, of in measures.items()}
        for name in measures[BASE].means
        if name not in ("voice", "habits")
    }
    by_name["copied"] = {
        who: copied_share(texts(side), training_runs) for who, side in answers.items()
    }
    return by_name


def habits(author: Author, answers: Answers) -> list[HabitResult]:
    """Your habits in the answers to the held-out questions."""
    return measure_habits(author.habits, *(texts(answers[who]) for who in (CHOSEN, BASE, TUNED)))


def dpo_added(outcome: Outcome) -> DpoAdded | None:
    """What DPO added to the supervised model. None for a run without SFT or without DPO.

    If several evaluations of DPO were made, the best of them was chosen on these questions, so the
    gain is an upper estimate.
    """
    before, after = outcome.end_of_sft, outcome.of_dpo
    if before is None or after is None:
        return None
    return {
        "end_of_sft": before.measures.means,
        "dpo": after.measures.means,
        "voice": voice_gain(before, after).values,
    }


def texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text for answer in answers]
