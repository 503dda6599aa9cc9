"""Multiple choice: which answer to a question does a model find the most likely?"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..data.encoding import Encoder
from ..data.pairs import LENGTH
from ..files.schema import Range
from ..scoring.log_probs import find_head, token_log_probs

OPTIONS = 4


@dataclass(frozen=True)
class Choice:
    """A question, its OPTIONS answers, and which of them is right.

    Raises ValueError for a blank question, and unless the answers are different texts.
    """

    question: str
    options: list[str]
    right: Annotated[int, Range(0, OPTIONS - 1)]

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError('"question" is empty')
        texts = {option.strip() for option in self.options} - {""}
        if not len(texts) == len(self.options) == OPTIONS:
            raise ValueError(f'"options" must be {OPTIONS} different texts')


def check_choices(model: nn.Module, encoder: Encoder, choices: Sequence[Choice]) -> list[bool]:
    """Whether the model finds the right answer to each question more likely than the wrong ones.

    Compares the means of their tokens' log-probs, so that a long answer has no disadvantage. The
    end of turn is not scored, because it would favour answers that sound complete.
    """
    means = option_means(model, encoder, choices)
    return [picks_right(row, choice.right) for row, choice in zip(means, choices, strict=True)]


def picks_right(means: Sequence[float], right: int) -> bool:
    """Whether the right option has the highest mean, alone."""
    return all(means[right] > mean for place, mean in enumerate(means) if place != right)


def option_means(
    model: nn.Module, encoder: Encoder, choices: Sequence[Choice]
) -> list[list[float]]:
    """The mean log-prob per token of each option as the answer to its question, in nats.

    The tokens that all prompts begin with, such as the system message, are read once.
    """
    model.eval()
    prompts = [encoder.prompt_ids(choice.question) for choice in choices]
    # The last token of a prompt predicts the first one of an answer, so it is read with each.
    start = os.path.commonprefix([prompt[:-1] for prompt in prompts])
    cache = make_prompt_cache(model)
    _read(model, start, cache)
    rows = []
    for choice, prompt in zip(choices, prompts, strict=True):
        options = [encoder.answer_ids(option, LENGTH) for option in choice.options]
        values = _log_probs(model, copy.deepcopy(cache), prompt[len(start) :], options)
        rows.append([float(option.mean()) for option in values])
    return rows


def _log_probs(
    model: nn.Module, cache: list[Any], prompt: list[int], answers: list[list[int]]
) -> list[np.ndarray]:
    """The log-prob of each token of several answers to one prompt, in nats. `cache` has read what
    stands before the prompt.

    The prompt is read once, and then all answers at once. Padding at their ends changes nothing,
    because no token sees a later one.
    """
    backbone, head = find_head(model)
    _read(model, prompt[:-1], cache)
    count, length = len(answers), max(map(len, answers))
    padded = mx.array([[*ids, *[0] * (length - len(ids))] for ids in answers])
    inputs = mx.concatenate([mx.full((count, 1), prompt[-1]), padded[:, :-1]], axis=1)
    hidden = backbone(inputs, [layer.merge([layer] * count) for layer in cache])
    log_probs = token_log_probs(hidden.reshape(-1, hidden.shape[-1]), padded.reshape(-1), head)
    rows = np.array(log_probs.reshape(padded.shape))
    return [row[: len(ids)] for row, ids in zip(rows, answers, strict=True)]


def _read(model: nn.Module, ids: Sequence[int], cache: list[Any]) -> None:
    """Add tokens to a cache."""
    if ids:
        backbone, _ = find_head(model)
        backbone(mx.array([list(ids)]), cache)
        mx.eval([layer.state for layer in cache])  # computed now, not again for each copy
