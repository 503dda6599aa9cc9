"""The two phases of a run, SFT and DPO: what each minimises, its groups of pairs, its rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from .config import Config, TrainConfig
from .engine import Engine, PairScore, score_against, summarise
from .pairs import EncodedPair
from .reference import Reference

SFT, DPO = "sft", "dpo"
PHASES = (SFT, DPO)  # in the order of a run


@dataclass(frozen=True)
class Example:
    """A pair with its reference."""

    pair: EncodedPair
    reference: Reference


class Sft:
    """Supervised fine-tuning on the chosen answers, with the rate and epochs of `sft`."""

    name = SFT

    def __init__(self, config: Config) -> None:
        self.settings = replace(config.train, **asdict(config.sft))

    def gradient(self, engine: Engine, example: Example) -> tuple[float, Any]:
        return engine.nll_gradient(example.pair.chosen)

    def numbers(self, score: float) -> list[float]:
        """What a score is made of, for another process to make it again by `score`."""
        return [score]

    def score(self, example: Example, numbers: list[float]) -> float:
        return numbers[0]

    def loss(self, score: float) -> float:
        return score

    def summary(self, scores: list[float]) -> dict[str, float]:
        return {"nll_loss": float(np.mean(scores))}

    def tokens(self, example: Example) -> int:
        return len(example.pair.chosen.ids)


class Dpo:
    """The preference loss on both answers."""

    name = DPO

    def __init__(self, config: Config) -> None:
        self.settings = config.train
        self._dpo = config.dpo

    def gradient(self, engine: Engine, example: Example) -> tuple[PairScore, Any]:
        return engine.pair_gradient(example.pair, example.reference, self._dpo)

    def numbers(self, score: PairScore) -> list[float]:
        """What a score is made of, for another process to make it again by `score`."""
        return [float(log_prob) for log_prob in score.pi]

    def score(self, example: Example, numbers: list[float]) -> PairScore:
        chosen, rejected = numbers
        return score_against((chosen, rejected), example.pair, example.reference, self._dpo)

    def loss(self, score: PairScore) -> float:
        return score.loss

    def summary(self, scores: list[PairScore]) -> dict[str, float]:
        return summarise(scores, self._dpo.beta)

    def tokens(self, example: Example) -> int:
        return len(example.pair.chosen.ids) + len(example.pair.rejected.ids)


def pairs_per_update(train: TrainConfig) -> int:
    return train.batch_size * train.grad_accumulation


def count_updates(train: TrainConfig, pairs: int) -> int:
    """Updates of a whole run; the last one of an epoch may hold fewer pairs."""
    return train.epochs * math.ceil(pairs / pairs_per_update(train))


def groups(train: TrainConfig, pairs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch from 0, indices of the pairs of one update): every pair once an epoch, shuffled."""
    size = pairs_per_update(train)
    for epoch in range(train.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(pairs).tolist()
        for start in range(0, pairs, size):
            yield epoch, order[start : start + size]


def learning_rate(train: TrainConfig, updates: int) -> Callable[[mx.array], mx.array]:
    """The rate at each update from 0: a linear warm-up that starts above zero, then the schedule.

    The cosine reaches zero one update after the last.
    """
    warmup = min(round(train.warmup_ratio * updates), updates - 1)
    peak = train.learning_rate
    if train.schedule == "cosine":
        schedule = optim.cosine_decay(peak, updates - warmup)
    else:
        schedule = optim.linear_schedule(peak, peak, updates)
    if warmup == 0:
        return schedule
    rise = optim.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optim.join_schedules([rise, schedule], [warmup])


def of_name(name: str, config: Config) -> Sft | Dpo:
    return Sft(config) if name == SFT else Dpo(config)
