"""The training loop of a phase: gradients of a group of pairs, an update, an evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
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
from .guard import Guard
from .pairs import EncodedPair
from .reference import Reference
from .sampling import batch_seed
from .writing import Measures

# How far the policy's log-prob may be from the reference's before the first update, in nats. The
# same code computes both, and LoRA adds exact zeros: any true fault is far larger.
START_TOLERANCE = 1e-2

# Of a phase, when the config does not say how far apart.
EVALUATIONS = 3


@dataclass(frozen=True)
class Example:
    """A pair with its reference."""

    pair: EncodedPair
    reference: Reference


class Stopped(Exception):
    """Training must not go on after this update, for these reasons."""

    def __init__(self, update: int, reasons: list[str]) -> None:
        super().__init__(*reasons)
        self.update = update
        self.reasons = reasons


class Sft:
    """Supervised fine-tuning on the chosen answers, with the rate and epochs of `sft`."""

    name = "sft"

    def __init__(self, config: Config) -> None:
        self.settings = replace(config.train, **asdict(config.sft))

    def gradient(self, engine: Engine, example: Example) -> tuple[float, Any]:
        return engine.nll_gradient(example.pair.chosen)

    def summary(self, scores: list[float]) -> dict[str, float]:
        return {"nll_loss": float(np.mean(scores))}

    def tokens(self, example: Example) -> int:
        return len(example.pair.chosen.ids)


class Dpo:
    """The preference loss on both answers."""

    name = "dpo"

    def __init__(self, config: Config) -> None:
        self.settings = config.train
        self._dpo = config.dpo

    def gradient(self, engine: Engine, example: Example) -> tuple[PairScore, Any]:
        return engine.pair_gradient(example.pair, example.reference, self._dpo)

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


class Trainer:
    """One phase of a run, `Sft` or `Dpo`, over a model that carries LoRA adapters.

    At each evaluation `watch` tells what the model writes, `guard` whether that is the best so
    far, and whether to stop; `run_dir/checkpoints/last` and `best` are written. Metrics go to
    `callback`; `first` is the number of updates of earlier phases.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        phase: Sft | Dpo,
        train: list[Example],
        valid: list[Example],
        callback: TrainingCallback,
        watch: Callable[[], Measures],
        guard: Guard,
        first: int = 0,
    ) -> None:
        self.model = model
        self.config = config
        self.phase = phase
        self.train_examples = train
        self.valid_examples = valid
        self.callback = callback
        self.watch = watch
        self.guard = guard
        self.first = first
        self.engine = Engine(model)
        self.updates = count_updates(phase.settings, len(train))
        # MLX's AdamW leaves the bias correction out by default: its first steps are then several
        # times larger than Adam's.
        self.optimizer = optim.AdamW(
            learning_rate=learning_rate(phase.settings, self.updates),
            weight_decay=phase.settings.weight_decay,
            bias_correction=True,
        )

    def run(self, written: Measures | None = None) -> Measures:
        """Train to the end, from a model that writes `written` (None: to be seen); what it writes
        then.

        Raises Stopped when the guard (unless it is off) or a number that is not finite ends it,
        UserError when the run does not start at the reference.
        """
        written = written or self.watch()
        self._evaluate(self.first, written)
        steps = groups(self.phase.settings, len(self.train_examples), self.config.seed)
        last = self.first + self.updates
        every = self.config.train.eval_every or math.ceil(self.updates / EVALUATIONS)
        for update, (epoch, indices) in enumerate(steps, start=self.first + 1):
            self._update(update, epoch, [self.train_examples[i] for i in indices])
            if (update - self.first) % every == 0 or update == last:
                written = self.watch()
                self._evaluate(update, written)
        return written

    def _update(self, update: int, epoch: int, examples: list[Example]) -> None:
        started = time.perf_counter()
        mx.reset_peak_memory()
        self.model.train()
        # Dropout depends on the update alone, not on what was sampled before it.
        mx.random.seed(batch_seed(self.config.seed, update))
        with models.gradient_checkpointing(self.model, self.config.train.grad_checkpoint):
            scores, gradient = self._mean_gradient(examples)
        if update == self.first + 1:
            self._check_start([score for score in scores if isinstance(score, PairScore)])
        gradient, norm = clip_grad_norm(gradient, self.config.train.max_grad_norm)
        if not math.isfinite(float(norm)):
            lines = [example.pair.line for example in examples]
            reason = (
                f"{self.config.data.train_pairs}: the gradient of the pairs on lines {lines} is "
                "not finite; look at them, or lower train.learning_rate"
            )
            raise Stopped(update - 1, [reason])
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        seconds = time.perf_counter() - started
        self.callback.on_train_loss_report(
            {
                "iteration": update,
                "phase": self.phase.name,
                "epoch": epoch + 1,
                **self.phase.summary(scores),
                "grad_norm": float(norm),
                "learning_rate": float(self.optimizer.learning_rate),
                "pairs": len(examples),
                "tokens_per_second": sum(map(self.phase.tokens, examples)) / seconds,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
            }
        )

    def _mean_gradient(self, examples: list[Example]) -> tuple[list[Any], Any]:
        """Scores and the mean gradient of the pairs, summed one after the other."""
        scores, total = [], None
        for example in examples:
            score, gradient = self.phase.gradient(self.engine, example)
            scores.append(score)
            if total is not None:
                gradient = tree_map(mx.add, total, gradient)
                mx.eval(gradient)
            total = gradient
        return scores, tree_map(lambda g: g / len(examples), total)

    def _evaluate(self, update: int, written: Measures) -> None:
        """Score the valid pairs, report, and keep the adapters as last and perhaps as best."""
        self.model.eval()
        scores = [
            self.engine.score(example.pair, example.reference, self.config.dpo)
            for example in self.valid_examples
        ]
        if update == self.first:
            self._check_start(scores)
        metrics = summarise(scores, self.config.dpo.beta)
        change = metrics["logps/chosen_change_per_token"]
        crossed = self.guard.crossed(written, change)
        self.callback.on_val_loss_report(
            {
                "iteration": update,
                "phase": self.phase.name,
                **{f"eval_{name}": value for name, value in metrics.items()},
                **{f"eval_text/{name}": value for name, value in written.items()},
            }
        )
        models.save_adapters(self.model, self.config.lora, self._checkpoint("last"))
        if self.guard.is_best(update, written, change):
            models.copy_folder(self._checkpoint("last"), self._checkpoint("best"))
        if crossed and self.config.guard.enabled:
            raise Stopped(update, crossed)

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
