"""The training loop of a phase: updates and evaluations."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.optimizers import clip_grad_norm
from mlx_lm.tuner.callbacks import TrainingCallback

from . import checkpoint, device, signals
from .checkpoint import Checkpoints, Origin, SaveClock, State
from .config import Config
from .engine import LEAST_DIFFERENCE, PairScore, rounding_limit, score_against, summarise
from .errors import UserError
from .fusing import dtype_of
from .guard import Guard
from .pairs import EncodedPair, Sequence
from .phase import Dpo, Example, Sft, count_updates, groups, learning_rate
from .sampling import batch_seed
from .worker import Worker, log_probs
from .writing import Measures

# Default: at most 3 evaluations per phase, at least 10 updates apart. Answering an evaluation's
# questions takes about as long as five updates.
EVALUATIONS, APART = 3, 10

# Updates in a row that may be skipped for numbers that are not finite.
MOST_SKIPPED = 3


def apart(updates: int) -> int:
    """Updates from one evaluation of a phase to the next, where the config does not say."""
    return math.ceil(updates / min(max(updates // APART, 1), EVALUATIONS))


class Stopped(Exception):
    """Training must not go on after this update, for these reasons."""

    def __init__(self, update: int, reasons: list[str]) -> None:
        super().__init__(*reasons)
        self.update = update
        self.reasons = reasons


class Trainer:
    """One phase of a run, `Sft` or `Dpo`, over a worker's model, which carries LoRA adapters.

    At each evaluation `watch` tells what the model writes, `guard` whether that is the best so
    far, and whether to stop. Metrics go to `callback`, and where the run is to
    `run_dir/checkpoints`, with the `origin` of the run; `first` is the number of updates of
    earlier phases, `rows` that of their metrics.
    """

    def __init__(
        self,
        worker: Worker,
        config: Config,
        phase: Sft | Dpo,
        train: list[Example],
        valid: list[Example],
        callback: TrainingCallback,
        watch: Callable[[], Measures],
        guard: Guard,
        first: int = 0,
        rows: int = 0,
        origin: Origin | None = None,
    ) -> None:
        self.worker = worker
        self.model = worker.model
        self.config = config
        self.phase = phase
        self.train_examples = train
        self.valid_examples = valid
        self.callback = callback
        self.watch = watch
        self.guard = guard
        self.first = first
        self.origin = origin or Origin()
        self.state = State(phase.name, first, rows)
        self.checkpoints = Checkpoints(config.run.checkpoints)
        self.save_clock = SaveClock()
        self.updates = count_updates(phase.settings, len(train))
        # MLX's AdamW leaves the bias correction out by default: its first steps are then several
        # times larger than Adam's.
        self.optimizer = optim.AdamW(
            learning_rate=learning_rate(phase.settings, self.updates),
            weight_decay=phase.settings.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.model.trainable_parameters())

    def resume(self, path: Path, state: State) -> None:
        """Go on from a checkpoint of this phase."""
        checkpoint.restore(path, self.model, self.optimizer)
        self.state = state

    def run(self, written: Measures | None = None) -> None:
        """Train to the end, from a model that writes `written` (None: to be seen).

        Raises Stopped when the guard (unless it is off) or numbers that are not finite end it,
        Interrupted on a signal, with everything saved, and UserError when the run does not start
        at the reference.
        """
        try:
            self._stop_if_told()
            if self._is_due():
                self._evaluate(written or self.watch())
            for epoch, indices in self._groups_left():
                self._update(epoch, [self.train_examples[i] for i in indices])
                if self._is_due():
                    self._evaluate(self.watch())
        except signals.Interrupted:
            self._save()
            raise

    def _groups_left(self) -> Iterator[tuple[int, list[int]]]:
        steps = groups(self.phase.settings, len(self.train_examples), self.config.seed)
        return itertools.islice(steps, self.state.update - self.first, None)

    def _is_due(self) -> bool:
        """Whether an evaluation is to come before the next update."""
        done = self.state.update - self.first
        every = self.config.train.eval_every or apart(self.updates)
        at_one = done % every == 0 or done == self.updates
        return at_one and not self.state.evaluated

    def _save(self) -> None:
        """Save a checkpoint, but none before the first evaluation, which chooses the first best."""
        self.state.base, self.state.best = self.guard.base, self.guard.best
        if self.state.best is None:
            return
        with self.save_clock.saving(checkpoint.size(self.model)):
            self.checkpoints.save(
                self.state, self.origin, self.model, self.config.lora, self.optimizer
            )

    def _stop_if_told(self) -> None:
        if self.state.stopped:
            raise Stopped(self.state.update, self.state.stopped)

    def _update(self, epoch: int, examples: list[Example]) -> None:
        update = self.state.update + 1
        started = time.perf_counter()
        mx.reset_peak_memory()
        # Dropout depends on the update alone, not on what was sampled before it.
        seed = batch_seed(self.config.seed, update)
        scores, gradient, broken = self.worker.gradient(self.phase, examples, seed)
        # The reference is scored without dropout. The first evaluation checks the valid pairs
        # without it too.
        if update == self.first + 1 and not self.config.lora.dropout:
            self._check_start(examples, scores)
        gradient, norm = clip_grad_norm(gradient, self.config.train.max_grad_norm)
        about = {
            "iteration": update,
            "phase": self.phase.name,
            "epoch": epoch + 1,
            "pairs": len(examples),
        }
        if broken or not math.isfinite(float(norm)):
            self._skip(about, broken or [example.pair.line for example in examples])
            return
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        seconds = time.perf_counter() - started
        self.state.in_a_row = 0
        self._end_update(
            {
                **about,
                **self.phase.summary(scores),
                "grad_norm": float(norm),
                "learning_rate": float(self.optimizer.learning_rate),
                "tokens_per_second": sum(map(self.phase.tokens, examples)) / seconds,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
            }
        )

    def _skip(self, about: dict[str, Any], lines: list[int]) -> None:
        """End an update that must not touch the adapters, for these lines of the train pairs."""
        self.state.skipped += 1
        self.state.in_a_row += 1
        if self.state.in_a_row == MOST_SKIPPED:
            self.state.stopped = [
                f"{self.config.data.train_pairs}: {MOST_SKIPPED} updates in a row had numbers that "
                f"are not finite, the last from the pairs on lines {lines}; look at them, or lower "
                "train.learning_rate"
            ]
        self._end_update({**about, "skipped_updates": self.state.skipped, "skipped_lines": lines})
        self._stop_if_told()

    def _end_update(self, metrics: dict[str, Any]) -> None:
        self.callback.on_train_loss_report(metrics)
        self.state.rows += 1
        self.state.update += 1
        self.state.evaluated = False
        if self._is_save_due() or self._is_due() or self.state.stopped:
            self._save()

    def _is_save_due(self) -> bool:
        every = self.config.train.save_every
        if every is None:
            return self.save_clock.is_due()
        return (self.state.update - self.first) % every == 0

    def _evaluate(self, written: Measures) -> None:
        """Score the valid pairs, report, and keep the adapters, perhaps as the best."""
        pairs = [example.pair for example in self.valid_examples]
        both = zip(self.valid_examples, log_probs(self.worker, pairs), strict=True)
        scores = [score_against(pi, e.pair, e.reference, self.config.dpo) for e, pi in both]
        update = self.state.update
        if update == self.first:
            self._check_start(self.valid_examples, scores)
        metrics = summarise(scores, self.config.dpo.beta)
        change = metrics["logps/chosen_change_per_token"]
        self.callback.on_val_loss_report(
            {
                "iteration": update,
                "phase": self.phase.name,
                **{f"eval_{name}": value for name, value in metrics.items()},
                **{f"eval_text/{name}": value for name, value in written.items()},
            }
        )
        self.state.rows += 1
        self.state.evaluated, self.state.written = True, written
        crossed = self.guard.judge(update, written, change)
        if crossed and self.config.guard.enabled:
            self.state.stopped = crossed
        self._save()
        self._stop_if_told()

    def _check_start(self, examples: list[Example], scores: list[Any]) -> None:
        """Before the first update the policy is the reference: the margin is 0, DPO's loss ln 2.

        On one machine the same kernels compute both, so they are equal; other machines of the run
        may round differently. Raises UserError for a difference that rounding does not explain, and
        prints a line when a single machine's scores differ.
        """
        dtype, largest = dtype_of(self.model), 0.0
        for example, score in zip(examples, scores, strict=True):
            if not isinstance(score, PairScore):
                continue  # SFT's train pairs have no reference
            for side, pi, ref in zip(example.pair.sides, score.pi, score.ref, strict=True):
                if not math.isfinite(pi):
                    continue  # the update will be skipped, and its pair named
                off, limit = abs(float(pi) - float(ref)), rounding_limit(side.answer_length, dtype)
                if not off <= limit:
                    raise UserError(self._start_fault(example.pair, side, float(pi), off, limit))
                largest = max(largest, off)
        if largest > LEAST_DIFFERENCE:
            reason = (
                "different machines round differently, which is harmless"
                if self.worker.size > self.worker.here
                else "rounding can explain that, so training goes on. On one machine they should "
                "be equal; please report it with the output of ./train_dpo_run1.sh --selftest"
            )
            print(
                f"10: before the first update the policy's log-probs are up to {largest:.2g} nats "
                f"off the reference's: {reason}"
            )

    def _start_fault(
        self, pair: EncodedPair, side: Sequence, pi: float, off: float, limit: float
    ) -> str:
        """Why the policy does not start at the reference: a wrong file or a wrong computation."""
        where = f"{self.config.run.references}: pair on line {pair.line}: "
        gap = f"{off:.3g} nats off, and rounding explains only {limit:.2g}"
        again = self.worker.log_probs([side])[0]
        if abs(again - pi) <= limit:
            return (
                f"{where}the stored log-prob is {gap}: the file is damaged or belongs to another "
                "model; delete that folder and run 10_train_dpo.py again"
            )
        return (
            f"{where}the model scores one answer {again:.2f} without and {pi:.2f} with a gradient "
            f"({gap}). This is a bug in the pipeline or in MLX on {device.name()}, not in your "
            "data; please report it with the output of ./train_dpo_run1.sh --selftest"
        )
