"""The schedule of a phase: how many updates, which pairs in each, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ..config import TrainConfig


def pairs_per_update(train: TrainConfig) -> int:
    """The pairs whose gradients are averaged for one update."""
    return train.batch_size * train.grad_accumulation


def count_updates(train: TrainConfig, pairs: int) -> int:
    """The updates of a phase over so many pairs. The last update of an epoch may hold fewer."""
    return train.epochs * math.ceil(pairs / pairs_per_update(train))


def groups(train: TrainConfig, pairs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch from 0, indices of the pairs) of each update.

    Every epoch shuffles the pairs anew and uses each of them once.
    """
    size = pairs_per_update(train)
    for epoch in range(train.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(pairs).tolist()
        for start in range(0, pairs, size):
            yield epoch, order[start : start + size]


def learning_rate(train: TrainConfig, updates: int) -> Callable[[mx.array], mx.array]:
    """The learning rate as a function of the updates done.

    A linear warm-up, whose first rate is above zero, then `train.schedule`. The cosine would reach
    zero one update after the last.
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
