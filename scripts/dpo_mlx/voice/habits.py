"""Habits: how an author's answers differ from the base model's in ways that a reader can check."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypedDict

import numpy as np

from ..files.schema import Finite
from .fluency import units

MAX_HABITS = 12
# A habit differs by at least this much: in the share of answers, or in standard deviations.
MIN_SHARE_DIFFERENCE, MIN_EFFECT = 0.3, 0.8
# The difference divided by its standard error. Chance exceeds this for 1 trait in about 370.
MIN_Z = 3.0
# How many opening words, closing words and distinctive phrases to try.
CANDIDATES = 12
# Total weight of the prior of the log-odds, in words (Monroe et al. 2008, section 3.3.2).
PRIOR = 500.0

MARKS = (
    ("commas", ",，、", "commas"),
    ("semicolons", ";；", "semicolons"),
    ("colons", ":：", "colons"),
    ("dashes", "–—", "dashes"),
    ("parentheses", "(（", "parentheses"),
    ("question marks", "?？", "question"),
    ("exclamation marks", "!！", "exclamation"),
)
# What may stand before a word, and around it.
OPENING_MARKS = "#>*_-+•\"'“”„«»‘’「『([ "
WORD_MARKS = OPENING_MARKS + ",.:;!?)，。：；！？"
LIST_ITEM = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+\S", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+\S", re.MULTILINE)
BOLD = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", re.DOTALL)
QUOTE = re.compile(r'^["“„«「『>]')
SENTENCE_END = re.compile(r"[.!?](?=[\s\"'”»」』)*_]|$)|[。！？]|\n")
CONTRACTION = re.compile(r"\b\w+['’](?:t|s|re|ve|ll|d|m)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Trait:
    """A measure of one answer: 1 or 0 for whether it has the trait, or an amount.

    `needs_end` marks a trait of the whole answer, which an answer that was cut off does not show.
    Of the traits of one `family`, which say nearly the same, only the strongest becomes a habit.
    """

    name: str
    value: Callable[[str], float]
    family: str
    is_share: bool = True
    needs_end: bool = False


class HabitResult(TypedDict):
    """A habit's mean in your answers, the base model's and the tuned model's.

    `carried` is whether the tuned model is nearer to you than to the base model.
    """

    name: str
    yours: Finite
    base: Finite
    tuned: Finite
    is_share: bool
    carried: bool


def find_habits(
    author: Sequence[str], base: Sequence[str], base_ended: Sequence[bool]
) -> list[Trait]:
    """The traits whose values differ most between an author's answers and the base model's.

    At most MAX_HABITS, the strongest first, one of each family. `base_ended` says which of the base
    model's answers ended by themselves.
    """
    whole = [text for text, ended in zip(base, base_ended, strict=True) if ended]
    strengths = [
        (_strength(trait, author, whole if trait.needs_end else base), trait)
        for trait in _traits(author, base)
    ]
    ranked = sorted((entry for entry in strengths if entry[0]), key=lambda entry: -entry[0])
    return _without_repetition([trait for _, trait in ranked])


def measure_habits(
    habits: Sequence[Trait], yours: Sequence[str], base: Sequence[str], tuned: Sequence[str]
) -> list[HabitResult]:
    """Each habit in three sets of answers to the same questions."""
    return [_measure(habit, yours, base, tuned) for habit in habits]


def _measure(habit: Trait, *answers: Sequence[str]) -> HabitResult:
    yours, base, tuned = (float(np.mean([habit.value(text) for text in side])) for side in answers)
    return {
        "name": habit.name,
        "yours": yours,
        "base": base,
        "tuned": tuned,
        "is_share": habit.is_share,
        "carried": abs(tuned - yours) < abs(tuned - base),
    }


def _strength(trait: Trait, author: Sequence[str], base: Sequence[str]) -> float:
    """How far a trait's values differ: Cohen's h for shares, Cohen's d for amounts (Cohen 1988,
    chapters 6 and 2). 0 for a difference that is small or may be chance.
    """
    if min(len(author), len(base)) < 2:
        return 0.0
    a, b = (np.array([trait.value(text) for text in side]) for side in (author, base))
    difference = abs(float(a.mean() - b.mean()))
    spread = math.sqrt((a.var() + b.var()) / 2)
    # Values that are all equal have no variance: count one answer as different.
    error = math.sqrt(
        max(a.var(), 1 / len(a) ** 2) / len(a) + max(b.var(), 1 / len(b) ** 2) / len(b)
    )
    if difference < MIN_Z * error:
        return 0.0
    if trait.is_share:
        angles = [2 * math.asin(math.sqrt(float(side.mean()))) for side in (a, b)]
        return abs(angles[0] - angles[1]) if difference >= MIN_SHARE_DIFFERENCE else 0.0
    effect = difference / spread if spread else math.inf
    return min(effect, math.pi) if effect >= MIN_EFFECT else 0.0


def _without_repetition(ranked: Sequence[Trait]) -> list[Trait]:
    """The first MAX_HABITS traits, each of another family."""
    by_family: dict[str, Trait] = {}
    for trait in ranked:
        by_family.setdefault(trait.family, trait)
    return list(by_family.values())[:MAX_HABITS]


def _traits(author: Sequence[str], base: Sequence[str]) -> Iterator[Trait]:
    """All traits to try. Of equally strong ones the earlier wins: the more telling stand first."""
    yield Trait("opens with bold text", lambda text: bool(BOLD.match(text.lstrip())), "bold")
    yield Trait("opens with a heading", lambda text: bool(HEADING.match(text.lstrip())), "heading")
    yield Trait("opens with a list", lambda text: bool(LIST_ITEM.match(text.lstrip())), "list")
    yield Trait("opens with a quote", lambda text: bool(QUOTE.match(text.lstrip())), "quote")
    yield Trait("opens with a question", _opens_with_question, "question")
    for word in _frequent(map(first_word, [*author, *base])):
        yield Trait(f'opens with "{word}"', partial(_opens_with, word), f"opening {word}")
    for word in _frequent(map(closing_word, author)):
        name = f'closes with a paragraph that begins "{word}"'
        yield Trait(name, partial(_closes_with, word), f"closing {word}", needs_end=True)
    yield Trait("ends with a question", partial(_ends_with, "?？"), "question", needs_end=True)
    yield Trait(
        "ends with an exclamation", partial(_ends_with, "!！"), "exclamation", needs_end=True
    )
    yield Trait("has bold text", lambda text: bool(BOLD.search(text)), "bold")
    yield Trait("has a heading", lambda text: bool(HEADING.search(text)), "heading")
    yield Trait("has a list", lambda text: bool(LIST_ITEM.search(text)), "list")
    yield Trait("has several paragraphs", lambda text: len(paragraphs(text)) > 1, "paragraphs")
    yield Trait("uses contractions", lambda text: bool(CONTRACTION.search(text)), "contractions")
    for word, pattern in (("I", r"\bI\b"), ("we", r"\b[Ww]e\b"), ("you", r"\b[Yy]ou\b")):
        trait = partial(_contains, re.compile(pattern))
        yield Trait(f'says "{word}"', trait, f"word {word.casefold()}")
    for phrase in distinctive_phrases(author, base):
        yield Trait(f'uses "{phrase}"', partial(_has_phrase, phrase), f"word {phrase}")
    yield Trait("words per sentence", _words_per_sentence, "sentences", is_share=False)
    yield Trait("words per answer", _length, "length", is_share=False, needs_end=True)
    for name, marks, family in MARKS:
        rate = partial(_per_100_words, marks)
        yield Trait(f"{name} per 100 words", rate, family, is_share=False)


def _frequent(words: Iterable[str]) -> list[str]:
    return [word for word, _ in Counter(filter(None, words)).most_common(CANDIDATES)]


def _opens_with(word: str, text: str) -> bool:
    return first_word(text) == word


def _closes_with(word: str, text: str) -> bool:
    return closing_word(text) == word


def _length(text: str) -> float:
    return len(units(text))


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def first_word(text: str) -> str:
    """The first word of a text, without the marks around it. Empty for a text without words."""
    words = units(text.lstrip(OPENING_MARKS + "\n\t"))
    return words[0].strip(WORD_MARKS) if words else ""


def closing_word(text: str) -> str:
    """The first word of the last of several paragraphs. Empty for a single paragraph."""
    parts = paragraphs(text)
    return first_word(parts[-1]) if len(parts) > 1 else ""


def _opens_with_question(text: str) -> bool:
    end = SENTENCE_END.search(text.strip())
    return end is not None and end[0] in "?？"


def _ends_with(marks: str, text: str) -> bool:
    return text.rstrip("*_\"'”»」』) \n").endswith(tuple(marks))


def _contains(pattern: re.Pattern[str], text: str) -> bool:
    return bool(pattern.search(text))


def _words_per_sentence(text: str) -> float:
    return len(units(text)) / max(1, len([s for s in SENTENCE_END.split(text) if s.strip("*_# ")]))


def _per_100_words(marks: str, text: str) -> float:
    return 100 * sum(text.count(mark) for mark in marks) / max(1, len(units(text)))


@lru_cache(maxsize=4096)  # each text is searched for several phrases
def _phrases(text: str) -> set[str]:
    """The words and pairs of neighbouring words of a text, in lower case and without marks."""
    words = [unit.strip(WORD_MARKS).casefold() for unit in units(text)]
    words = [word if any(map(str.isalnum, word)) else "" for word in words]
    pairs = {f"{a} {b}" for a, b in zip(words, words[1:], strict=False) if a and b}
    return {word for word in words if word} | pairs


def _has_phrase(phrase: str, text: str) -> bool:
    return phrase in _phrases(text)


def distinctive_phrases(author: Sequence[str], base: Sequence[str]) -> list[str]:
    """The author's most distinctive words and pairs of words, the clearest first.

    Ranked by the z-score of the log-odds-ratio with an informative Dirichlet prior, over the
    answers that contain a phrase (Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16,
    20 and 22). The prior is the share of a phrase in both sides together.
    """
    counts = [
        Counter(phrase for text in side for phrase in _phrases(text)) for side in (author, base)
    ]
    totals = [sum(count.values()) for count in counts]
    together = counts[0] + counts[1]
    scores = {}
    for phrase, count in counts[0].items():
        prior = PRIOR * together[phrase] / sum(totals)
        odds, variance = [], 0.0
        for side, total in zip(counts, totals, strict=True):
            inside = side[phrase] + prior
            odds.append(math.log(inside / (total + PRIOR - inside)))
            variance += 1 / inside
        if count > 1:
            scores[phrase] = (odds[0] - odds[1]) / math.sqrt(variance)
    ranked = sorted(scores, key=lambda phrase: (-scores[phrase], phrase))
    return [phrase for phrase in ranked[:CANDIDATES] if scores[phrase] > MIN_Z]
