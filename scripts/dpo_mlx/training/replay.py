"""Replay: SFT also trains on the base model's own answers to unrelated prompts, so that it changes
little there.

The answers are drawn from the base model's distribution, so the gradient of their negative
log-likelihood is about that of KL(base || policy) on these prompts, with the same weight for each
answer whatever its length (self-synthesized rehearsal, Huang et al. 2024, arXiv:2403.01244). The
prompts are others than those of data/cost, on which the cost of training is measured.
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
    """The base model's answers to at most `count` of the prompts, as examples of SFT.

    Seeds MLX's random state. The same seed gives the same answers, so a run that resumes draws them
    again.
    """
    prompts = cost.read_prompts(FILE)[:count]
    answers = cost.base_answers(worker, encoder, prompts, batch_size, seed, True)
    return [_example(answer) for answer in answers]


def _example(answer: EncodedAnswer) -> Example:
    """SFT reads only the chosen answer and no reference. Line 0 is in no file."""
    return Example(EncodedPair(answer, answer, line=0), Sides(math.nan, math.nan))


def of_update(examples: Sequence[Example], update: int, size: int, seed: int) -> list[Example]:
    """The examples that an update repeats, `size` of them; updates count from 1.

    All examples come up once, in a new order each time, before any comes up again.
    """
    places = range((update - 1) * size, update * size)
    rounds = {place // len(examples) for place in places}
    orders = {n: np.random.default_rng([seed, n]).permutation(len(examples)) for n in rounds}
    return [examples[orders[p // len(examples)][p % len(examples)]] for p in places]
