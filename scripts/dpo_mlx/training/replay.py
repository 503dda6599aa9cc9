"""Replay: training also keeps the model near the base model on unrelated prompts.

Each update adds the gradient of KL(base || policy), the mean over the tokens of some of the base
model's own answers to these prompts (learning without forgetting, Li and Hoiem 2016,
arXiv:1606.09282; on the model's own answers, Huang et al. 2024, arXiv:2403.01244). It compares
whole distributions instead of raising the answers' likelihood: at the base model its gradient is
zero, so the model does not memorise these few answers. data/cost, which measures the cost of
training, has other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.encoding import EncodedAnswer, EncodedPair, Encoder
from ..model.sampling import EVALUATED_AT_ONCE
from ..parallel.worker import Worker
from ..scoring.losses import Sides
from ..scoring.objectives import Example
from ..voice import cost

FILE = Path(__file__).resolve().parents[3] / "data" / "replay" / "prompts.jsonl"


def base_examples(worker: Worker, encoder: Encoder, count: int, seed: int) -> list[Example]:
    """The base model's answers to the first prompts, `count` or somewhat more, as examples of
    `Replay`.

    Seeds MLX's random state. The same seed gives the same answers whatever the count, so a run that
    resumes draws them again. Batches are whole for that reason.
    """
    whole = math.ceil(count / EVALUATED_AT_ONCE) * EVALUATED_AT_ONCE
    prompts = cost.read_prompts(FILE)[:whole]
    answers = cost.base_answers(worker, encoder, prompts, EVALUATED_AT_ONCE, seed, True)
    return [_example(answer) for answer in answers]


def longest(encoder: Encoder) -> EncodedAnswer:
    """A sequence as long as the longest that replay may need, with any ids."""
    prompt = max(len(encoder.prompt_ids(prompt)) for prompt in cost.read_prompts(FILE))
    return EncodedAnswer((0,) * (prompt + cost.MAX_TOKENS), prompt)


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
