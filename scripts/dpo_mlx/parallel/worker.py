"""Computes with one process's copy of the model: log-probs, gradients and answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..config import GenerationConfig
from ..data.encoding import EncodedAnswer, EncodedPair
from ..model.adapters import adapters_off
from ..model.gradient_checkpointing import gradient_checkpointing
from ..model.sampling import Answer, Batch, batch_seed, batches, sample_batch, sample_ids
from ..process import signals
from ..scoring.losses import Sides
from ..scoring.objectives import Example, Objective
from ..scoring.scorer import Scorer

Item = TypeVar("Item")


@dataclass(frozen=True)
class ExampleScore:
    """The values of an example's score (see `Objective.values`), and whether its loss and its
    gradient are finite.
    """

    values: list[float]
    finite: bool


class Worker:
    """Computes with a model in this process. `DistributedWorker` does the same in several.

    `tokenizer` is mlx-lm's wrapper; only `answers` needs it.
    """

    size = local_processes = 1  # processes of the run; of these, the ones on this machine

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.model)

    def log_probs(
        self, sequences: list[EncodedAnswer], without_adapters: bool = False
    ) -> list[float]:
        """log p(answer | prompt) of each sequence, summed over the answer's tokens, in nats."""
        with self._adapters(without_adapters):
            return [self.scorer.log_prob(sequence) for sequence in self._each(sequences)]

    def gradient(
        self, objective: Objective, examples: list[Example], seed: int
    ) -> tuple[list[Any], Any, list[int]]:
        """(scores, mean gradient in the trainable parameters (a tree), lines of the pairs whose
        loss or gradient is not finite).

        `seed` and an example's place in the list determine its dropout.
        """
        scores, total = self._gradients(objective, list(enumerate(examples)), seed)
        return self._mean(objective, examples, scores, total)

    def answers(
        self,
        batches: list[Batch],
        settings: GenerationConfig,
        without_adapters: bool = False,
    ) -> list[list[Answer]]:
        """Sampled answers, one list for each batch."""
        self.model.eval()
        with self._adapters(without_adapters):
            return [
                sample_batch(self.model, self.tokenizer, batch, settings)
                for batch in self._each(batches)
            ]

    def sequences(
        self,
        batches: list[Batch],
        settings: GenerationConfig,
        without_adapters: bool = False,
    ) -> list[list[EncodedAnswer]]:
        """The same answers as the sampled token ids after their prompts."""
        self.model.eval()
        with self._adapters(without_adapters):
            return [
                [
                    EncodedAnswer((*prompt, *ids), len(prompt))
                    for prompt, ids in zip(
                        batch.prompts,
                        sample_ids(self.model, self.tokenizer, batch, settings),
                        strict=True,
                    )
                ]
                for batch in self._each(batches)
            ]

    def _each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items. A signal can end the stage before each of them."""
        for item in items:
            signals.check()
            yield item

    def _adapters(self, without_adapters: bool) -> AbstractContextManager[None]:
        return adapters_off(self.model) if without_adapters else nullcontext()

    def _gradients(
        self, objective: Objective, examples: list[tuple[int, Example]], seed: int
    ) -> tuple[list[ExampleScore], Any]:
        """(scores, sum of the gradients) of examples with their places; the sum of none is None."""
        self.model.train()
        scores, total = [], None
        with gradient_checkpointing(self.model, objective.settings.grad_checkpoint):
            for place, example in self._each(examples):
                mx.random.seed(batch_seed(seed, place))
                score: Any
                score, gradient = objective.gradient(self.scorer, example)
                finite = math.isfinite(objective.loss(score)) and _is_finite(gradient)
                scores.append(ExampleScore(objective.values(score), finite))
                if total is not None:
                    gradient = tree_map(mx.add, total, gradient)
                    mx.eval(gradient)
                total = gradient
        return scores, total

    def _mean(
        self,
        objective: Objective,
        examples: list[Example],
        example_scores: list[ExampleScore],
        total: Any,
    ) -> tuple[list[Any], Any, list[int]]:
        """What `gradient` returns, from the scores and the sum of the gradients."""
        scores, broken_lines = [], []
        for example, score in zip(examples, example_scores, strict=True):
            scores.append(objective.score(example, score.values))
            if not score.finite:
                broken_lines.append(example.pair.line)
        return scores, tree_map(lambda g: g / len(examples), total), broken_lines


def answer_all(
    worker: Worker,
    prompts: list[list[int]],
    settings: GenerationConfig,
    seed: int,
    greedy: bool = False,
    without_adapters: bool = False,
) -> list[Answer]:
    """One answer for each prompt, in batches of settings.batch_size."""
    parts = batches(prompts, settings.batch_size, seed, greedy)
    answers = worker.answers(parts, settings, without_adapters)
    return [answer for batch in answers for answer in batch]


def log_probs(worker: Worker, encoded: list[EncodedPair]) -> list[Sides[float]]:
    """log p(answer | prompt) of both sides of each pair, in nats."""
    values = worker.log_probs([side for pair in encoded for side in pair.sides])
    return list(map(Sides, values[::2], values[1::2]))


def _is_finite(gradient: Any) -> bool:
    return all(bool(mx.isfinite(g).all()) for g in dict(tree_flatten(gradient)).values())
