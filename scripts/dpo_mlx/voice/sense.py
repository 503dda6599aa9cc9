"""Does an answer answer its question? Fluent text in the right voice may ignore it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..data.encoding import EncodedAnswer, Encoder
from ..data.pairs import Pair
from ..model.sampling import Answer

# Sequences to their log-probs, in nats, as Worker.log_probs.
LogProbs = Callable[[list[EncodedAnswer]], list[float]]


def log_probs_per_token(
    questions: Sequence[Pair], answers: Sequence[Answer], log_probs: LogProbs, encoder: Encoder
) -> np.ndarray:
    """Each answer's mean log-prob per token after its question, in nats: [len(answers)] float64.

    NaN for an empty answer.
    """
    sequences = [
        encoder.encode(question.prompt, answer.text, answer.finish)
        for question, answer in zip(questions, answers, strict=True)
    ]
    lengths = np.array([sequence.answer_length for sequence in sequences])
    values = iter(log_probs([sequence for sequence in sequences if sequence.answer_length]))
    return np.array([next(values) / length if length else np.nan for length in lengths])


def sense(after_own: np.ndarray, after_other: np.ndarray) -> np.ndarray:
    """How much likelier each answer's tokens are after its own question than after another one, in
    nats per token: [len(after_own)] float64.

    This is the pointwise mutual information of question and answer (the objective of Li et al.
    2016, arXiv:1510.03055) per token, with another question in place of no question. About 0 for an
    answer that would fit any question, and 0 for an empty one.
    """
    return np.nan_to_num(after_own - after_other, nan=0.0)


def other_questions(questions: Sequence[Pair]) -> list[Pair]:
    """For each question another one of the list. A single question has only itself."""
    return [*questions[1:], *questions[:1]]
