"""The split of questions into train and valid, and which questions count as the same."""

from __future__ import annotations

import random
import unicodedata

import pytest
from dpo_mlx.data import questions


def made_up(count: int) -> list[str]:
    draw = random.Random(0)
    nouns = ["sky", "sea", "salt", "moon", "bread", "rust", "echo", "frost", "wheel", "spring"]
    return [f"Why does {draw.choice(nouns)} number {i} {draw.choice(nouns)}?" for i in range(count)]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_share_is_near_the_fraction(fraction):
    """2000 questions: the share held out lies within four standard errors."""
    held = sum(questions.is_held_out(question, fraction) for question in made_up(2000))
    assert abs(held / 2000 - fraction) < 4 * (fraction * (1 - fraction) / 2000) ** 0.5


def test_no_fraction_holds_nothing_out():
    """valid_fraction 0 is an empty valid split, not one question by chance."""
    assert not any(questions.is_held_out(question, 0.0) for question in made_up(2000))


def test_side_never_changes():
    """The split is the same on every machine and in every version: these sides are fixed."""
    sides = [questions.is_held_out(f"question {i}", 0.5) for i in range(16)]
    assert "".join("tv"[side] for side in sides) == "vvttvtttvttvtvvt"


def test_larger_fraction_only_adds():
    """Raising valid_fraction moves no question back into train."""
    for question in made_up(500):
        sides = [questions.is_held_out(question, fraction) for fraction in (0.1, 0.2, 0.5)]
        assert sides == sorted(sides)


@pytest.mark.parametrize(
    "copy",
    [
        "why is the sky blue",
        "WHY IS THE SKY BLUE???",
        "  Why,  is the\nsky - blue?! ",
        "“Why is the sky blue?”",
        "Why is\u00a0the sky\u3000blue?",
        "\ufeffWhy is the s\u200bky bl\u00adue?",
        "Ｗhy is the ｓky blue？",
    ],
)
def test_copies_share_a_side(copy):
    """Copies that differ in case, blanks or punctuation never straddle the split."""
    for number in range(50):
        expected = questions.is_held_out(f"Why is the sky blue? {number}", 0.5)
        assert questions.is_held_out(f"{copy} {number}", 0.5) == expected


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_the_form_of_accents_makes_no_difference(form):
    """A Mac writes some accents as characters of their own; one question must have one side."""
    question = "Où naît l'œuvre de Brontë à Việt Nam, et 한국?"
    assert questions.words(unicodedata.normalize(form, question)) == questions.words(question)


def test_the_words_of_plain_questions_are_those_of_earlier_versions():
    """Or a question would change its side in a later version."""
    assert questions.words("Why is Zürich's  1st œuvre (2 < 3) “naïve_x”?") == (
        "why is zürich s 1st œuvre 2 3 naïve_x"
    )
