"""What a process computes with its copy of the model: log-probs, gradients and answers."""

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

from . import models, signals
from .config import GenerationConfig
from .engine import Engine
from .pairs import EncodedPair, Sequence
from .phase import Dpo, Example, Sft
from .sampling import Answer, Batch, batch_seed, batches, sample_batch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Scored:
    """What a phase says of one pair, and whether its loss and its gradient are finite."""

    numbers: list[float]
    finite: bool


class Worker:
    """Computes with a model in this process alone; `Team` does the same with several.

    The tokenizer, mlx-lm's wrapper, is for answers. `plain` is the model without its adapters.
    """

    size = here = 1  # processes; those on this machine

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model)

    def log_probs(self, sequences: list[Sequence], plain: bool = False) -> list[float]:
        """log p(answer | prompt) of each, summed over the answer's tokens, in nats."""
        with self._adapters(plain):
            return [self.engine.log_prob(sequence) for sequence in self._each(sequences)]

    def gradient(
        self, phase: Sft | Dpo, examples: list[Example], seed: int
    ) -> tuple[list[Any], Any, list[int]]:
        """(scores, their mean gradient in the trainable parameters, lines of the pairs whose loss
        or gradient is not finite). Dropout is seeded by `seed` and a pair's place.
        """
        found, total = self._gradients(phase, list(enumerate(examples)), seed)
        return self._mean(phase, examples, found, total)

    def answers(
        self, asked: list[Batch], settings: GenerationConfig, plain: bool = False
    ) -> list[list[Answer]]:
        """Sampled answers, one list a batch."""
        self.model.eval()
        with self._adapters(plain):
            return [
                sample_batch(self.model, self.tokenizer, batch, settings)
                for batch in self._each(asked)
            ]

    def _each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Between two of which the stage can be left."""
        for item in items:
            signals.check()
            yield item

    def _adapters(self, plain: bool) -> AbstractContextManager[None]:
        return models.adapters_off(self.model) if plain else nullcontext()

    def _gradients(
        self, phase: Sft | Dpo, examples: list[tuple[int, Example]], seed: int
    ) -> tuple[list[Scored], Any]:
        """What is found of pairs with their places, and the sum of their gradients, None of no
        pairs; one pair after the other.
        """
        self.model.train()
        found, total = [], None
        with models.gradient_checkpointing(self.model, phase.settings.grad_checkpoint):
            for place, example in self._each(examples):
                mx.random.seed(batch_seed(seed, place))
                score: Any
                score, gradient = phase.gradient(self.engine, example)
                finite = math.isfinite(phase.loss(score)) and _is_finite(gradient)
                found.append(Scored(phase.numbers(score), finite))
                if total is not None:
                    gradient = tree_map(mx.add, total, gradient)
                    mx.eval(gradient)
                total = gradient
        return found, total

    def _mean(
        self, phase: Sft | Dpo, examples: list[Example], found: list[Scored], total: Any
    ) -> tuple[list[Any], Any, list[int]]:
        both = list(zip(examples, found, strict=True))
        scores = [phase.score(example, scored.numbers) for example, scored in both]
        broken = [example.pair.line for example, scored in both if not scored.finite]
        return scores, tree_map(lambda g: g / len(examples), total), broken


def answer_all(
    worker: Worker, prompts: list[list[int]], settings: GenerationConfig, seed: int
) -> list[Answer]:
    """One sampled answer a prompt, in batches of settings.batch_size."""
    made = worker.answers(batches(prompts, settings.batch_size, seed), settings)
    return [answer for answers in made for answer in answers]


def log_probs(worker: Worker, encoded: list[EncodedPair]) -> list[tuple[float, float]]:
    """log p of (chosen, rejected) of each pair, in nats."""
    found = worker.log_probs([side for pair in encoded for side in pair.sides])
    return list(zip(found[::2], found[1::2], strict=True))


def _is_finite(gradient: Any) -> bool:
    return all(bool(mx.isfinite(g).all()) for g in dict(tree_flatten(gradient)).values())
