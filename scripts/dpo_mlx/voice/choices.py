"""Multiple choice: which answer to a question does a model find the most likely?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

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
    model.eval()
    return [picks_right(option_means(model, encoder, choice), choice.right) for choice in choices]


def picks_right(means: Sequence[float], right: int) -> bool:
    """Whether the right option has the highest mean, alone."""
    return all(means[right] > mean for place, mean in enumerate(means) if place != right)


def option_means(model: nn.Module, encoder: Encoder, choice: Choice) -> list[float]:
    """The mean log-prob per token of each option as the answer to the question, in nats."""
    options = [encoder.answer_ids(option, LENGTH) for option in choice.options]
    values = continuation_log_probs(model, encoder.prompt_ids(choice.question), options)
    return [float(np.mean(option)) for option in values]


def continuation_log_probs(
    model: nn.Module, prompt: list[int], continuations: list[list[int]]
) -> list[np.ndarray]:
    """The log-prob of each token of several continuations of one prompt, in nats.

    The prompt is read once, and then all continuations at once. Padding at their ends changes
    nothing, because no token sees a later one.
    """
    backbone, head = find_head(model)
    cache = make_prompt_cache(model)
    backbone(mx.array([prompt[:-1]]), cache)
    batch_cache = [layer.merge([layer] * len(continuations)) for layer in cache]
    length = max(map(len, continuations))
    padded = mx.array([[*ids, *[0] * (length - len(ids))] for ids in continuations])
    last = mx.full((len(continuations), 1), prompt[-1])
    hidden = backbone(mx.concatenate([last, padded[:, :-1]], axis=1), batch_cache)
    log_probs = token_log_probs(hidden.reshape(-1, hidden.shape[-1]), padded.reshape(-1), head)
    rows = np.array(log_probs.reshape(padded.shape))
    return [row[: len(ids)] for row, ids in zip(rows, continuations, strict=True)]
