"""Habits: what tells an author from the base model, found and counted as a reader would."""

from __future__ import annotations

import math
import random

import pytest
from dpo_mlx.voice.habits import (
    MAX_HABITS,
    PRIOR,
    SENTENCE_END,
    HabitResult,
    Trait,
    closing_word,
    distinctive_phrases,
    find_habits,
    first_word,
    measure_habits,
    paragraphs,
)

WORDS = ("water", "light", "air", "stone", "river", "glass", "iron", "cloud", "salt", "wood")


def plain(seed: int) -> str:
    """An ordinary answer of two sentences."""
    rng = random.Random(seed)
    a, b, c, d = rng.sample(WORDS, 4)
    return f"The {a} holds the {b} for a while. The {c} does it, and the {d} follows."


def author(seed: int) -> str:
    """The same with two habits: an opening in bold, and a last paragraph that begins "So"."""
    rng = random.Random(seed)
    a, b, c, d = rng.sample(WORDS, 4)
    return f"**The {a} holds the {b}.** The {c} does it.\n\nSo take the {d}, for a while."


PLAIN, AUTHOR = [plain(i) for i in range(60)], [author(i) for i in range(60)]
ENDED = [True] * 60


def names(author: list[str], base: list[str], ended: list[bool] = ENDED) -> list[str]:
    return [habit.name for habit in find_habits(author, base, ended)]


def test_planted_habits_are_found():
    """Both, before anything weaker; bold text is named once."""
    found = names(AUTHOR, PLAIN)
    assert {"opens with bold text", 'closes with a paragraph that begins "So"'} <= {*found[:3]}
    assert "has bold text" not in found and len(found) <= MAX_HABITS


def test_two_halves_of_one_author_have_no_habits():
    """What differs by chance is not a habit."""
    for seed in range(10):
        texts = [plain(i) for i in range(200)]
        random.Random(seed).shuffle(texts)
        assert names(texts[:100], texts[100:], [True] * 100) == []


def test_an_answer_that_was_cut_off_does_not_show_how_it_would_have_closed():
    """With every base answer cut, only traits of the beginning are left to compare."""
    found = names(AUTHOR, PLAIN, [False] * 60)
    assert "opens with bold text" in found
    assert not [name for name in found if "closes" in name or "per answer" in name]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_answers_have_no_habits(count):
    """One answer has no habit, and none is no error."""
    assert names(AUTHOR[:count], PLAIN[:count], ENDED[:count]) == []


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One two. Three four!", 2),
        ("**One.** Two\n\nThree", 3),
        ("About 3.14 of it.", 1),  # no blank follows the first mark
        ("天空是蓝色的。水也是吗？是！", 3),  # these marks need none
    ],
)
def test_sentences_are_counted_in_any_script(text, sentences):
    """A sentence ends at its mark, or with its line."""
    assert len([part for part in SENTENCE_END.split(text) if part.strip("*_# ")]) == sentences


def test_habits_work_without_blanks():
    """Chinese: the bold opening, the first character of the last paragraph, a frequent one."""

    def chinese(seed: int, own: bool) -> str:
        a, b = random.Random(seed).sample("水光空石河玻铁云盐木风热冷谷叶", 2)
        if own:
            return f"**{a}在{b}里。** 它在动。\n\n所以看看{b}吧。"
        return f"{a}在{b}里面，它在慢慢地动。"

    mine = [chinese(i, True) for i in range(40)]
    found = names(mine, [chinese(i, False) for i in range(40)], [True] * 40)
    assert {"opens with bold text", 'closes with a paragraph that begins "所"'} <= {*found}


@pytest.mark.parametrize(
    ("text", "opening", "closing"),
    [
        ("", "", ""),
        ("**", "", ""),
        ("So be it.", "So", ""),
        ('**"Well,"** she said.\n\n- So, no.', "Well", "So"),
        ("# Title\n\n\n\n> Quote", "Title", "Quote"),
        ("1. One\n2. Two", "1", ""),
        ("天空是蓝的。\n\n所以看。", "天", "所"),
    ],
)
def test_words_at_both_ends_by_hand(text, opening, closing):
    """Marks and Markdown are not words; a single paragraph has no closing."""
    assert (first_word(text), closing_word(text)) == (opening, closing)


def test_paragraphs_by_hand():
    """Blank lines divide, also with blanks on them; empty parts do not count."""
    assert paragraphs("a\nb\n\n \n\nc\n") == ["a\nb", "c"]


def test_distinctive_phrases_by_hand():
    """The z-score of "red" by the paper's equations: in 3 of 4 answers against 1 of 4. The prior
    is a quarter of PRIOR, as "red" is 4 of the 16 phrases of both sides. Few answers prove nothing.
    """
    mine = ["red sky", "red sky", "red sky", "sky"]
    theirs = ["sky", "sky", "red sky", "sky"]
    # Phrases: red, sky, "red sky" -> 3 + 4 + 3 and 1 + 4 + 1.
    prior = PRIOR * 4 / 16
    a, b = 3 + prior, 1 + prior
    odds = math.log(a / (10 + PRIOR - a)) - math.log(b / (6 + PRIOR - b))
    z = odds / math.sqrt(1 / a + 1 / b)
    assert 0 < z < 3 and distinctive_phrases(mine, theirs) == []
    many = (
        [text for text in mine for _ in range(200)],
        [text for text in theirs for _ in range(200)],
    )
    assert distinctive_phrases(*many)[0] in ("red", "red sky")


def row(yours: float, base: float, tuned: float) -> HabitResult:
    trait = Trait("a", lambda text: float(text), "a", is_share=False)
    [result] = measure_habits([trait], [str(yours)], [str(base)], [str(tuned)])
    return result


@pytest.mark.parametrize(
    ("yours", "base", "tuned", "carried"),
    [(1, 0, 1, True), (1, 0, 0, False), (1, 0, 0.5, False), (1, 0, 0.6, True), (0, 1, 0.3, True)],
)
def test_carried_over_is_nearer_to_you(yours, base, tuned, carried):
    """Half of the way is not carried over."""
    assert row(yours, base, tuned)["carried"] is carried


def test_a_collapsed_model_carries_no_habit():
    """One word again and again has none of the planted habits."""
    habits = find_habits(AUTHOR, PLAIN, ENDED)
    results = measure_habits(habits, AUTHOR[:12], PLAIN[:12], ["hormonal " * 90] * 12)
    planted = [r for r in results if "bold" in r["name"] or "closes" in r["name"]]
    assert planted and not any(r["carried"] for r in planted)
