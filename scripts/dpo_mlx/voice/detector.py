"""Can a reader tell the model's answers from the author's? A classifier two-sample test.

A fresh classifier learns to tell a model's answers from the author's real answers to the same
held-out questions, and is asked about questions it has not seen (Lopez-Paz and Oquab 2017,
arXiv:1610.06545). At 50% it cannot tell them apart. Unlike a score of the author's voice it never
sees the base model.

Each question is left out in turn with both of its answers. So every training set has as many
answers of each side, and two sides that are alike get 50% on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import intervals
from .fluency import units
from .habits import (
    BOLD,
    CONTRACTION,
    HEADING,
    LIST_ITEM,
    MARKS,
    QUOTE,
    SENTENCE_END,
    paragraphs,
)
from .intervals import Interval
from .voice_classifier import features

# The ridge penalty, when an answer's features have length 1 on average.
RIDGE = 1.0
# Random exchanges of the two answers of some questions, for the p-value.
EXCHANGES = 1000
SEED = 0
# Pairings of real answers with real answers.
PAIRINGS = 10


@dataclass(frozen=True)
class Detection:
    """How well the classifier tells a model's answers from the author's.

    `accuracy` is the balanced accuracy on unseen questions, from 0.5 (cannot tell) to 1. Its
    interval is over questions, and leaves out that training on other questions would have given
    another classifier. So whether there is any difference is for `p_value` to say: how often chance
    alone gives an accuracy as high. Below 0.05 there is one.
    """

    accuracy: Interval
    p_value: float


def detect(answers: Sequence[str], real: Sequence[str]) -> Detection:
    """Tells `answers` from `real`, the author's answers to the same questions.

    The p-value is of a permutation test: if the sides are alike, each question's two answers might
    as well be exchanged. Raises ValueError for sides of different lengths or fewer than 2
    questions.
    """
    predictions = _predictions(answers, real)
    accuracy = _accuracies(predictions, np.ones((len(real), 1)))[:, 0]
    rng = np.random.default_rng(SEED)
    exchanges = rng.choice([-1.0, 1.0], size=(len(real), EXCHANGES))
    by_chance = _accuracies(predictions, exchanges).mean(axis=0)
    as_high = np.sum(by_chance >= accuracy.mean() - 1e-9)
    return Detection(intervals.mean(accuracy), float((1 + as_high) / (1 + EXCHANGES)))


def real_against_real(real: Sequence[str], questions: int) -> float:
    """The check that the detector is calibrated: the mean accuracy on two sides that are both real.

    `real` are the author's answers, held out and of the train pairs. PAIRINGS times, answers are
    drawn and paired at random, as if they were two answers each to `questions` questions; fewer
    when there are not so many answers. It should be near 0.5. Raises ValueError for fewer than 4
    answers.
    """
    rng = np.random.default_rng(SEED)
    count = min(questions, len(real) // 2)
    accuracies = []
    for _ in range(PAIRINGS):
        drawn = [real[i] for i in rng.permutation(len(real))[: 2 * count]]
        predictions = _predictions(drawn[:count], drawn[count:])
        accuracies.append(_accuracies(predictions, np.ones((count, 1))).mean())
    return float(np.mean(accuracies))


def detectable_accuracy(questions: int) -> float:
    """The accuracy that a difference must have to be noticed (p < 0.05) 4 times in 5.

    For two sides that are alike, the accuracy has a standard deviation of about 0.45 /
    sqrt(questions), measured with 12 to 100 questions of two authors. So with 12 questions only a
    difference that gives 82% is noticed, with 24 one of 73%, with 50 one of 66%, with 200 one of
    58%.
    """
    return min(1.0, 0.5 + (1.645 + 0.842) * 0.45 / math.sqrt(questions))


def _predictions(answers: Sequence[str], real: Sequence[str]) -> np.ndarray:
    """The matrix that takes the labels of all answers to their predictions, [2N, 2N].

    The classifier is ridge regression on labels 1 (real) and -1. With the matrix H of its fit,
    H @ labels, a question that is left out has the errors (1 - H_qq)^-1 (labels - H @ labels)_q.
    """
    count = len(real)
    if len(answers) != count or count < 2:
        raise ValueError("a detector needs two sides of at least 2 answers to the same questions")
    gram = _gram([*real, *answers])
    identity = np.eye(2 * count)
    errors = identity - gram @ np.linalg.inv(gram + RIDGE * identity)
    predictions = identity.copy()
    for question in range(count):
        both = [question, question + count]
        predictions[both] -= np.linalg.solve(errors[np.ix_(both, both)], errors[both])
    return predictions


def _accuracies(predictions: np.ndarray, exchanges: np.ndarray) -> np.ndarray:
    """The share of each question's two answers that is told right, [N, exchanges].

    Where an exchange, [N, exchanges], is -1, the question's two answers have each other's label. A
    prediction of 0 is half right.
    """
    labels = np.concatenate([exchanges, -exchanges])
    agreement = (predictions @ labels) * labels
    right = np.where(np.abs(agreement) < 1e-9, 0.5, agreement > 0)
    return right.reshape(2, len(exchanges), -1).mean(axis=0)


def _gram(texts: Sequence[str]) -> np.ndarray:
    """Inner products of the texts' features: n-grams and style count the same."""
    styles = np.array([_style(text) for text in texts])
    blocks = (features(texts), styles / np.maximum(styles.std(axis=0), 1e-9))
    grams = []
    for block in blocks:
        centred = block - block.mean(axis=0)
        gram = centred @ centred.T
        grams.append(gram * len(texts) / max(np.trace(gram), 1e-12))
    return (grams[0] + grams[1]) / 2


def _style(text: str) -> list[float]:
    """What the eye sees before it reads: how a text opens and ends, its parts and its marks."""
    body = text.strip()
    shape = [bool(pattern.match(body)) for pattern in (BOLD, HEADING, LIST_ITEM, QUOTE)]
    patterns = (BOLD, HEADING, LIST_ITEM, SENTENCE_END, CONTRACTION)
    counts = [
        len(text),
        len(units(text)),
        len(paragraphs(text)),
        *(len(pattern.findall(text)) for pattern in patterns),
        *(sum(map(text.count, marks)) for _, marks, _ in MARKS),
    ]
    ends = bool(body) and not body[-1].isalnum()
    return [*map(float, shape), float(ends), *map(math.log1p, counts)]
