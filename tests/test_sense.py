"""Sense: does an answer answer its question?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from dpo_mlx.data.encoding import EncodedAnswer
from dpo_mlx.data.pairs import LENGTH, STOP, Pair
from dpo_mlx.model.sampling import Answer
from dpo_mlx.voice.sense import log_probs_per_token, other_questions, sense

QUESTIONS = [Pair(prompt, "c", "r") for prompt in ("one", "two", "three")]


class Letters:
    """In the place of an Encoder: a token for each letter, and one for the end of turn."""

    def encode(self, question: str, answer: str, finish: str) -> EncodedAnswer:
        ids = tuple(ord(letter) for letter in question + answer) + (0,) * (finish == STOP)
        return EncodedAnswer(ids, len(question))


def shared(sequences: list[EncodedAnswer]) -> list[float]:
    """Log-probs of a model that only repeats its prompt: 0 for a token in it, -1 for any other."""
    return [
        -sum(float(token not in s.ids[: s.prompt_length]) for token in s.ids[s.prompt_length :])
        for s in sequences
    ]


def test_sense_by_hand() -> None:
    """Under a model that repeats its prompt: an answer that repeats its own question has sense, one
    that repeats the other question has negative sense, one that repeats neither has none. An
    answer without an end of turn is divided by fewer tokens.
    """
    answers = [Answer("one", LENGTH, 3), Answer("three", STOP, 5), Answer("xyz", STOP, 3)]
    encoder = Letters()
    own = log_probs_per_token(QUESTIONS, answers, shared, encoder)  # type: ignore[arg-type]
    others = other_questions(QUESTIONS)
    other = log_probs_per_token(others, answers, shared, encoder)  # type: ignore[arg-type]
    # "one" after "two" has only its o, "three" after "two" only its t; the end of turn is in none.
    assert own.tolist() == pytest.approx([0, -5 / 6, -1])
    assert other.tolist() == pytest.approx([-2 / 3, -1 / 6, -1])
    assert sense(own, other).tolist() == pytest.approx([2 / 3, -4 / 6, 0])


def test_an_empty_answer_has_no_sense() -> None:
    """It has no tokens to divide by, and must neither raise nor count as good."""
    answers = [Answer("", LENGTH, 0), Answer("two", LENGTH, 3), Answer("", LENGTH, 0)]
    own = log_probs_per_token(QUESTIONS, answers, shared, Letters())  # type: ignore[arg-type]
    assert [math.isnan(value) for value in own] == [True, False, True]
    assert sense(own, own - 1).tolist() == [0, 1, 0]
    assert sense(np.array([np.nan]), np.array([np.nan])).tolist() == [0]


def test_every_question_gets_another_one() -> None:
    """A single question has only itself."""
    assert [pair.prompt for pair in other_questions(QUESTIONS)] == ["two", "three", "one"]
    assert other_questions(QUESTIONS[:1]) == QUESTIONS[:1]
