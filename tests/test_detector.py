"""The detector: sees what a reader sees at once, and nothing where there is nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
from dpo_mlx.voice import detector
from dpo_mlx.voice.detector import detect, detectable_accuracy, real_against_real

WORDS = [
    "water",
    "light",
    "air",
    "stone",
    "river",
    "glass",
    "iron",
    "cloud",
    "salt",
    "wood",
    "wind",
    "heat",
    "cold",
    "valley",
    "leaf",
]


def plain(draw: random.Random) -> str:
    """A few sentences about four things."""
    a, b, c, d = draw.sample(WORDS, 4)
    return f"The {a} holds the {b} for a while. The {c} {draw.choice(['does', 'has'])} it, so {d}."


def bold(draw: random.Random) -> str:
    """The same, but the first sentence is bold."""
    first, rest = plain(draw).split(". ", 1)
    return f"**{first}.** {rest}"


def many(make, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [make(draw) for _ in range(count)]


@pytest.mark.parametrize("questions", [8, 12, 48])
def test_an_obvious_difference_is_seen_with_few_questions(questions):
    """The author opens in bold and the model does not: every answer is told, and not by chance."""
    detection = detect(many(plain, questions, 0), many(bold, questions, 1))
    assert detection.accuracy.value == 1.0 and detection.p_value < 0.05


def test_one_voice_cannot_be_told_from_itself():
    """Over 40 experiments the accuracy is 50% on average, and a difference is claimed in few."""
    detections = [detect(many(plain, 16, 2 * i), many(plain, 16, 2 * i + 1)) for i in range(40)]
    assert np.mean([d.accuracy.value for d in detections]) == pytest.approx(0.5, abs=0.06)
    assert sum(d.p_value < 0.05 for d in detections) <= 6


def test_the_same_answers_are_at_half():
    """A model that answers word for word as the author does: each prediction is right for one."""
    answers = many(bold, 12, 0)
    assert detect(answers, answers).accuracy == detector.Interval(0.5, 0.5, 0.5)
    assert detect(answers, answers).p_value == 1.0


def test_half_of_the_answers_in_the_voice_is_between():
    """Accuracy falls as more of the model's answers are in the voice."""
    real = many(bold, 40, 1)
    answers = many(bold, 20, 2) + many(plain, 20, 3)
    assert 0.65 < detect(answers, real).accuracy.value < 0.85


def test_each_question_is_left_out_with_both_answers():
    """The closed form gives what training without the question gives."""
    answers, real = many(plain, 5, 0), many(bold, 5, 1)
    gram = detector._gram([*real, *answers])
    labels = np.repeat([1.0, -1.0], 5)
    predictions = detector._predictions(answers, real) @ labels
    for question in range(5):
        both = [question, question + 5]
        rest = [i for i in range(10) if i not in both]
        inner = gram[np.ix_(rest, rest)] + detector.RIDGE * np.eye(8)
        expected = gram[np.ix_(both, rest)] @ np.linalg.solve(inner, labels[rest])
        np.testing.assert_allclose(predictions[both], expected, atol=1e-9)


@pytest.mark.parametrize(
    ("real", "answer"),
    [
        ("**水在石头里。** 它在动。\n\n所以看看{}吧。", "{}在水里面，它在慢慢地动。"),
        ("空が{}のは光のためです。", "空が{}のは、光のためだ！"),
        ("# {}\n\n- a\n- b", "{} a b"),
        ("{} is it. Is it?", "{} is it. It is."),
    ],
)
def test_differences_in_any_script_and_form_are_seen(real, answer):
    """Chinese, Japanese, a heading with a list, a question at the end."""
    topics = list("水光空石河玻铁云盐木风热冷谷叶草")
    detection = detect([answer.format(t) for t in topics], [real.format(t) for t in topics[::-1]])
    assert detection.accuracy.value == 1.0


def test_empty_answers_are_a_difference_and_no_error():
    """A model that says nothing is not the author. If both say nothing they are alike."""
    assert detect([""] * 12, many(bold, 12, 0)).accuracy.value == 1.0
    assert detect([""] * 12, [""] * 12).accuracy.value == 0.5


def test_real_against_real_is_at_chance():
    """The check beside the figure, and with fewer answers than asked for."""
    assert real_against_real(many(bold, 60, 0), 24) == pytest.approx(0.5, abs=0.1)
    assert real_against_real(many(bold, 60, 0), 500) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("sides", [([], []), (["a"], ["b"]), (["a", "b"], ["c"])])
def test_too_few_or_unequal_sides_are_refused(sides):
    with pytest.raises(ValueError, match="same questions"):
        detect(*sides)


def test_detectable_accuracy_by_hand():
    """0.5 + 2.487 * 0.45 / sqrt(n): the table in the docstring; never above certainty."""
    table = {1: 1.0, 12: 0.82, 24: 0.73, 50: 0.66, 200: 0.58}
    assert {n: round(detectable_accuracy(n), 2) for n in table} == table


def test_the_power_is_what_is_claimed():
    """24 questions, half of the answers not in the voice: the accuracy is about 0.73, and most of
    30 experiments notice.
    """
    noticed = [
        detect(many(bold, 12, 3 * i) + many(plain, 12, 3 * i + 1), many(bold, 24, 3 * i + 2))
        for i in range(30)
    ]
    assert sum(detection.p_value < 0.05 for detection in noticed) >= 18
