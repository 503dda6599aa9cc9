"""The training loop: the gradient of a group of pairs, an update, an evaluation, the best kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_map
from mlx_lm.tuner.callbacks import TrainingCallback

from . import models
from .config import Config, TrainConfig
from .engine import Engine, PairScore, summarise
from .errors import UserError
from .pairs import EncodedPair
from .reference import Reference

# How far the policy's log-prob may be from the reference's before the first update, in nats. The
# same code computes both, and LoRA adds exact zeros: any true fault is far larger.
START_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Example:
    """A pair with its reference."""

    pair: EncodedPair
    reference: Reference


@dataclass(frozen=True)
class Outcome:
    """What training ended with."""

    updates: int
    best_update: int
    best_loss: float


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


class Trainer:
    """One DPO run over a model that carries LoRA adapters.

    Writes `run_dir/checkpoints/last` and `best` at each evaluation, and the best adapters to
    `run_dir/adapters` in the end. Metrics go to `callback`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        train: list[Example],
        valid: list[Example],
        callback: TrainingCallback,
    ) -> None:
        self.model = model
        self.config = config
        self.train_examples = train
        self.valid_examples = valid
        self.callback = callback
        self.engine = Engine(model)
        self.updates = count_updates(config.train, len(train))
        # MLX's AdamW leaves the bias correction out by default: its first steps are then several
        # times larger than Adam's.
        self.optimizer = optim.AdamW(
            learning_rate=learning_rate(config.train, self.updates),
            weight_decay=config.train.weight_decay,
            bias_correction=True,
        )
        self.best_update, self.best_loss = 0, math.inf

    def run(self) -> Outcome:
        """Train to the end. Raises UserError when the run does not start at the reference."""
        with models.gradient_checkpointing(self.model, self.config.train.grad_checkpoint):
            self._check_start(self._evaluate(0))
            steps = groups(self.config.train, len(self.train_examples), self.config.seed)
            for update, (epoch, indices) in enumerate(steps, start=1):
                self._update(update, epoch, [self.train_examples[i] for i in indices])
                if update % self.config.train.eval_every == 0 or update == self.updates:
                    self._evaluate(update)
        models.copy_folder(self._checkpoint("best"), self.config.run / "adapters")
        return Outcome(self.updates, self.best_update, self.best_loss)

    def _update(self, update: int, epoch: int, examples: list[Example]) -> None:
        started = time.perf_counter()
        mx.reset_peak_memory()
        self.model.train()
        scores, gradient = self._mean_gradient(examples)
        if update == 1:
            self._check_start(scores)
        gradient, norm = clip_grad_norm(gradient, self.config.train.max_grad_norm)
        if not math.isfinite(float(norm)):
            lines = [example.pair.line for example in examples]
            raise UserError(
                f"{self.config.data.train_pairs}: the gradient of the pairs on lines {lines} is "
                "not finite; lower train.learning_rate (earlier adapters are in checkpoints/)"
            )
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        seconds = time.perf_counter() - started
        tokens = sum(len(e.pair.chosen.ids) + len(e.pair.rejected.ids) for e in examples)
        self.callback.on_train_loss_report(
            {
                "iteration": update,
                "epoch": epoch + 1,
                **summarise(scores, self.config.dpo.beta),
                "grad_norm": float(norm),
                "learning_rate": float(self.optimizer.learning_rate),
                "pairs": len(examples),
                "tokens_per_second": tokens / seconds,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
            }
        )

    def _mean_gradient(self, examples: list[Example]) -> tuple[list[PairScore], Any]:
        """Scores and the mean gradient of the pairs, summed one after the other."""
        scores, total = [], None
        for example in examples:
            score, gradient = self.engine.pair_gradient(
                example.pair, example.reference, self.config.dpo
            )
            scores.append(score)
            if total is not None:
                gradient = tree_map(mx.add, total, gradient)
                mx.eval(gradient)
            total = gradient
        return scores, tree_map(lambda g: g / len(examples), total)

    def _evaluate(self, update: int) -> list[PairScore]:
        """Score the valid pairs, report, and keep the adapters as last and perhaps as best."""
        self.model.eval()
        scores = [
            self.engine.score(example.pair, example.reference, self.config.dpo)
            for example in self.valid_examples
        ]
        metrics = summarise(scores, self.config.dpo.beta)
        self.callback.on_val_loss_report(
            {"iteration": update, **{f"eval_{name}": value for name, value in metrics.items()}}
        )
        models.save_adapters(self.model, self.config.lora, self._checkpoint("last"))
        loss = metrics["loss"] + self.config.dpo.nll_weight * metrics["nll_loss"]
        if loss < self.best_loss:
            self.best_update, self.best_loss = update, loss
            models.copy_folder(self._checkpoint("last"), self._checkpoint("best"))
        return scores

    def _checkpoint(self, name: str) -> Path:
        return self.config.run / "checkpoints" / name

    def _check_start(self, scores: list[PairScore]) -> None:
        """Before the first update the policy is the reference: the margin is 0, DPO's loss ln 2."""
        for score in scores:
            off = max(abs(float(p) - float(r)) for p, r in zip(score.pi, score.ref, strict=True))
            if not off <= START_TOLERANCE:
                raise UserError(
                    f"{self.config.run / 'reference'}: before the first update the policy's "
                    f"log-prob is {off:.3g} nats off the reference's; delete that folder and run "
                    "10_train_dpo.py again"
                )
