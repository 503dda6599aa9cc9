"""Measures of repetition in a text."""

from __future__ import annotations

# The longest unit, in words, whose direct repetition counts as a loop.
LONGEST_UNIT = 12


def distinct_bigrams(text: str) -> float:
    """The share of word bigrams that are distinct. 1 for a text of fewer than two words."""
    words = text.split()
    bigrams = list(zip(words, words[1:], strict=False))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def longest_loop(text: str) -> int:
    """The length in words of the longest run that only repeats the words right before it.

    `a b a b a b` repeats `a b` twice, which makes 4 words. A repeated unit has 1 to LONGEST_UNIT
    words, and must be repeated whole at least once.
    """
    words = text.split()
    longest = 0
    for unit in range(1, LONGEST_UNIT + 1):
        run = 0
        for word, before in zip(words[unit:], words, strict=False):
            run = run + 1 if word == before else 0
            if run >= unit:
                longest = max(longest, run)
    return longest
