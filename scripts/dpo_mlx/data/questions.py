"""A question with its answer; how questions are compared, and split into train and valid."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass

from .pairs import STOP

# Characters that nobody sees: zero-width ones, soft hyphens and byte order marks.
INVISIBLE = re.compile("[\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


@dataclass(frozen=True)
class Question:
    """A question and the answer to learn, both stripped. A source of preference pairs also has the
    rejected answer, and why that ended (see `pairs`). `line` counts from 1.
    """

    question: str
    answer: str
    line: int
    system: str = ""
    rejected: str | None = None
    rejected_finish: str = STOP


def is_held_out(question: str, valid_fraction: float) -> bool:
    """Whether a question belongs to the valid split. This depends only on the question's words, so
    a question never changes its split.

    Questions that differ only in case, blanks, punctuation or the form of their characters are in
    the same split.
    """
    digest = hashlib.sha256(words(question).encode()).digest()
    return int.from_bytes(digest[:8], "big") < valid_fraction * 2**64


def words(question: str) -> str:
    """The question without case, blanks, punctuation and invisible characters, to compare it."""
    return " ".join(re.findall(r"\w+", normalise(question).casefold()))


def normalise(text: str) -> str:
    """The text in Unicode's NFKC form and without invisible characters, to compare it: an accent
    can be a character of its own, or part of its letter.
    """
    return unicodedata.normalize("NFKC", INVISIBLE.sub("", text))
