"""Is it still fluent? Repetition in a text."""

from __future__ import annotations

# The longest unit, in words, whose direct repetition counts as a loop.
LONGEST_UNIT = 12


def distinct_bigrams(text: str) -> float:
    """Distinct word bigrams over all of them; 1 for a text of fewer than two words."""
    words = text.split()
    bigrams = list(zip(words, words[1:], strict=False))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def longest_loop(text: str) -> int:
    """The most words in a row that only repeat the words right before them.

    `a b a b a b` repeats `a b` twice: 4. Units of 1 to LONGEST_UNIT words; what is repeated less
    than once whole is not a loop.
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
