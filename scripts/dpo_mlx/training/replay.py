"""Replay: training also holds the model near the base model on unrelated prompts.

Each update adds the gradient of KL(base || policy) on some of the base model's own answers to these
prompts, the mean over their tokens (learning without forgetting, Li and Hoiem 2016,
arXiv:1606.09282; on answers that the model itself gave, Huang et al. 2024, arXiv:2403.01244). The
divergence of whole distributions is used, not the answers' likelihood: at the base model its
gradient is zero, so it cannot teach the few answers by heart. The prompts are others than those of
data/cost, on which the cost of training is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.encoding import EncodedAnswer, EncodedPair, Encoder
from ..parallel.worker import Worker
from ..scoring.losses import Sides
from ..scoring.objectives import Example
from ..voice import cost

FILE = Path(__file__).resolve().parents[3] / "data" / "replay" / "prompts.jsonl"


def base_examples(
    worker: Worker, encoder: Encoder, count: int, batch_size: int, seed: int
) -> list[Example]:
    """The base model's answers to at most `count` of the prompts, as examples of `Replay`.

    Seeds MLX's random state. The same seed gives the same answers, so a run that resumes draws them
    again.
    """
    prompts = cost.read_prompts(FILE)[:count]
    answers = cost.base_answers(worker, encoder, prompts, batch_size, seed, True)
    return [_example(answer) for answer in answers]


def _example(answer: EncodedAnswer) -> Example:
    """Replay reads only the chosen answer and no reference. Line 0 is in no file."""
    return Example(EncodedPair(answer, answer, line=0), Sides(math.nan, math.nan))


def of_update(examples: Sequence[Example], update: int, size: int, seed: int) -> list[Example]:
    """The examples that an update replays, `size` of them; updates of a phase count from 1.

    All examples come up once, in a new order each time, before any comes up again.
    """
    places = range((update - 1) * size, update * size)
    rounds = {place // len(examples) for place in places}
    orders = {n: np.random.default_rng([seed, n]).permutation(len(examples)) for n in rounds}
    return [examples[orders[p // len(examples)][p % len(examples)]] for p in places]
