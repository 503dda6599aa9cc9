"""Measures of repetition in a text of any script."""

from __future__ import annotations

import re

# Scripts that put no blanks between words: Thai, Lao, Tibetan, Myanmar, Khmer; kana, Bopomofo and
# Han with their extensions, also in full width.
NO_BLANKS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
    "\u2e80-\u2fdf\u3000-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
# A word with more characters than any word has is a loop without blanks, such as "hahaha...".
MAX_WORD = 40
UNIT = re.compile(rf"[{NO_BLANKS}]|[^\s{NO_BLANKS}]+")

# The longest sequence, in units, whose direct repetition counts as a loop: a clause of words, and a
# sentence of characters.
MAX_WORDS, MAX_CHARACTERS = 12, 60


def units(text: str) -> list[str]:
    """The words of a text. Without blanks between words, and in a word of over MAX_WORD
    characters, each character is a unit.
    """
    words = UNIT.findall(text)
    return [unit for word in words for unit in (word if len(word) > MAX_WORD else [word])]


def distinct_bigrams(text: str) -> float:
    """The share of bigrams of units that are distinct. 1 for a text of fewer than two units."""
    sequence = units(text)
    bigrams = list(zip(sequence, sequence[1:], strict=False))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def longest_loop(text: str) -> int:
    """The length in units of the longest run that only repeats the units right before it.

    `a b a b a b` repeats `a b` twice, which makes 4 units. What is repeated has at most MAX_WORDS
    units, or MAX_CHARACTERS in a text without blanks between words, and must be repeated whole at
    least once.
    """
    sequence = units(text)
    has_blanks = len(sequence) <= 2 * len(text.split())
    longest, limit = 0, MAX_WORDS if has_blanks else MAX_CHARACTERS
    for period in range(1, limit + 1):
        run = 0
        for unit, before in zip(sequence[period:], sequence, strict=False):
            run = run + 1 if unit == before else 0
            if run >= period:
                longest = max(longest, run)
    return longest
