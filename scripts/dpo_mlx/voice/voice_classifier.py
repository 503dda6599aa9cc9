"""A classifier that tells chosen answers, which are in the voice, from rejected ones.

It says whether the two can be told apart at all. It does not measure a voice: it takes all that the
base model does not write for the author (see signature.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Hashed character n-grams: enough slots that collisions do not matter for a few thousand texts.
FEATURES = 2**14
NGRAMS = (2, 3, 4)
# The ridge penalty, and the number of steps: more would not change a printed figure.
RIDGE, STEPS = 1e-3, 300
# Below this accuracy on unseen pairs the classifier cannot tell the two sides apart.
MIN_ACCURACY = 0.8


@dataclass(frozen=True)
class VoiceClassifier:
    """Logistic regression on character n-grams: chosen against rejected answers.

    `weight` has shape [FEATURES], `bias` is a number; both float64.
    """

    weight: np.ndarray
    bias: float

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """Log-odds that each text is in the voice of the chosen answers, [len(texts)]."""
        return features(texts) @ self.weight + self.bias

    def accuracy(self, chosen: Sequence[str], rejected: Sequence[str]) -> float:
        """The balanced accuracy: the mean of both sides' shares of correct answers."""
        return float(
            ((self.log_odds(chosen) > 0).mean() + (self.log_odds(rejected) < 0).mean()) / 2
        )


def fit_classifier(chosen: Sequence[str], rejected: Sequence[str]) -> VoiceClassifier:
    """Fit the classifier by Nesterov's accelerated gradient on the ridge-penalised log-loss."""
    x = features([*chosen, *rejected])
    y = np.concatenate([np.ones(len(chosen)), np.zeros(len(rejected))])
    # Rows have norm 1, so the log-loss is smooth with a constant of at most 1/4 in each of the
    # weight and the bias.
    step = 1 / (0.5 + RIDGE)
    # Steps never leave the span of the rows: the weight is x.T @ mix, and x @ weight = gram @ mix.
    gram = x @ x.T
    mix = previous_mix = np.zeros(len(y))
    bias = previous_bias = 0.0
    for t in range(STEPS):
        momentum = t / (t + 3)
        m = mix + momentum * (mix - previous_mix)
        b = bias + momentum * (bias - previous_bias)
        error = (_sigmoid(gram @ m + b) - y) / len(y)
        previous_mix, previous_bias = mix, bias
        mix = m - step * (error + RIDGE * m)
        bias = b - step * error.sum()
    return VoiceClassifier(x.T @ mix, float(bias))


def features(texts: Sequence[str]) -> np.ndarray:
    """Square roots of hashed n-gram counts, in rows of norm 1: [len(texts), FEATURES] float64.

    Without the norm a long answer would get a large score because of its length.
    """
    rows = np.stack([np.sqrt(_counts(text)) for text in texts])
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _counts(text: str) -> np.ndarray:
    codes = np.array([ord(c) for c in text], dtype=np.uint64)
    counts = np.zeros(FEATURES)
    for n in NGRAMS:
        if len(codes) < n:
            continue
        mixed = np.full(len(codes) - n + 1, n, dtype=np.uint64)
        for i in range(n):  # a polynomial hash modulo 2^64, the same on every machine
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[i : len(codes) - n + 1 + i]
        slots = (mixed * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(64 - 14)
        counts += np.bincount(slots.astype(np.int64), minlength=FEATURES)
    return counts


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
