"""The training loop of a phase: updates and evaluations."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_map

from ..config import Config
from ..data.encoding import EncodedAnswer, EncodedPair
from ..files.errors import UserError
from ..files.results import Evaluation, Measures
from ..model import device
from ..model.fusing import dtype_of
from ..model.sampling import batch_seed
from ..parallel.worker import Worker, log_probs
from ..process import signals
from ..scoring import objectives
from ..scoring.objectives import Example
from ..scoring.scorer import MIN_DIFFERENCE, PairScore, rounding_limit, score_against, summarise
from . import checkpoint, replay
from .checkpoint import Checkpoints, SaveClock, State
from .guard import better, crossed_limits
from .metrics import MetricsFile
from .schedule import count_updates, groups, learning_rate

# Default: at most 3 evaluations per phase, at least 10 updates apart. Answering an evaluation's
# questions takes about as long as five updates.
EVALUATIONS, UPDATES_APART = 3, 10

# Updates in a row that give NaN or an infinity before the run stops.
MAX_SKIPPED = 3


def updates_between_evaluations(updates: int) -> int:
    """The default of `train.eval_every` for a phase of so many updates."""
    return math.ceil(updates / min(max(updates // UPDATES_APART, 1), EVALUATIONS))


class Stopped(Exception):
    """Training must not go on, for these reasons."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__(*reasons)
        self.reasons = reasons


@dataclass(frozen=True)
class Examples:
    """What a phase trains on, what its evaluations score, and what its updates replay."""

    train: list[Example]
    valid: list[Example]
    replay: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class _Step:
    """What the sequences of an update gave: the scores of its own examples, its metrics, whether
    all of it is finite, and the lines of the pairs that are not.
    """

    scores: list[Any]
    summary: dict[str, float]
    is_finite: bool
    broken_lines: list[int]


class Trainer:
    """Trains one phase of a run, the one that `state.phase` names.

    `worker` holds the model with its adapters. `measure_answers` asks that model the evaluation
    questions. `state` says where the run is; to resume from a checkpoint, also restore its tensors
    into the model and `optimizer`. Checkpoints go to `checkpoints`, metrics to `metrics`.
    """

    def __init__(
        self,
        worker: Worker,
        config: Config,
        examples: Examples,
        measure_answers: Callable[[], Measures],
        metrics: MetricsFile,
        checkpoints: Checkpoints,
        state: State,
    ) -> None:
        self.worker = worker
        self.model = worker.model
        self.config = config
        self.examples = examples
        self.measure_answers = measure_answers
        self.metrics = metrics
        self.checkpoints = checkpoints
        self.state = state
        self.objective = objectives.by_name(state.phase, config)
        self.replay_objective = objectives.by_name(objectives.REPLAY, config)
        self.save_clock = SaveClock()
        settings = self.objective.settings
        self.updates = count_updates(settings, len(examples.train))
        # MLX's AdamW leaves the bias correction out by default: its first steps are then several
        # times larger than Adam's.
        self.optimizer = optim.AdamW(
            learning_rate=learning_rate(settings, self.updates),
            weight_decay=settings.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.model.trainable_parameters())

    def run(self) -> None:
        """Train to the end of the phase.

        Raises Stopped when the guard (unless it is off) or NaN and infinities end the phase,
        Interrupted on a signal after saving a checkpoint, and UserError when the policy does not
        start at the reference.
        """
        try:
            self._raise_if_stopped()
            if self._is_evaluation_due():
                self._evaluate()
            for epoch, indices in self._remaining_groups():
                self._update(epoch, [self.examples.train[i] for i in indices])
                if self._is_evaluation_due():
                    self._evaluate()
        except signals.Interrupted:
            self._save()
            raise

    def _remaining_groups(self) -> Iterator[tuple[int, list[int]]]:
        all_groups = groups(self.objective.settings, len(self.examples.train), self.config.seed)
        return itertools.islice(all_groups, self.state.updates_of_phase, None)

    def _update(self, epoch: int, examples: list[Example]) -> None:
        """One training step: gradient, clipping, optimizer, report."""
        update = self.state.update + 1
        started = time.perf_counter()
        mx.reset_peak_memory()
        # This seeds the dropout, so that it depends on the update alone, not on sampled answers.
        seed = batch_seed(self.config.seed, update)
        replay_examples = self._replay_of_next_update()
        gradient, step = self._gradient(examples, replay_examples, seed)
        if self.state.updates_of_phase == 0 and not self.config.lora.dropout:
            self._check_start(examples, step.scores)  # the reference has no dropout
        gradient, norm = clip_grad_norm(gradient, self.config.train.max_grad_norm)
        phase = self.state.phase
        row = {"iteration": update, "phase": phase, "epoch": epoch + 1, "pairs": len(examples)}
        if not step.is_finite:
            self._skip(row, step.broken_lines)
            return
        if not math.isfinite(float(norm)):
            self._skip(row, [example.pair.line for example in examples])
            return
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        seconds = time.perf_counter() - started
        row |= {
            **step.summary,
            "grad_norm": float(norm),
            "learning_rate": float(self.optimizer.learning_rate),
            "tokens_per_second": self._tokens(examples, replay_examples) / seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        self.state.skipped_in_a_row = 0
        self._end_update(row)

    def _replay_of_next_update(self) -> list[Example]:
        """The base model's answers that the next update replays beside its own examples."""
        if not self.examples.replay:
            return []
        update, size = self.state.updates_of_phase + 1, self.config.train.replay
        return replay.of_update(self.examples.replay, update, size, self.config.seed)

    def _gradient(
        self, examples: list[Example], replay_examples: list[Example], seed: int
    ) -> tuple[Any, _Step]:
        """(the mean gradient of an update's own examples plus that of the replay, the rest)."""
        scores, gradient, lines = self.worker.gradient(self.objective, examples, seed)
        summary = self.objective.summary(scores)
        if not replay_examples:
            return gradient, _Step(scores, summary, not lines, lines)
        objective = self.replay_objective
        replay_scores, of_replay, broken = self.worker.gradient(objective, replay_examples, seed)
        summary |= objective.summary(replay_scores)
        step = _Step(scores, summary, not (lines or broken), lines)
        return tree_map(mx.add, gradient, of_replay), step

    def _tokens(self, examples: list[Example], replay_examples: list[Example]) -> int:
        """The tokens that an update's gradients run through."""
        replayed = sum(map(self.replay_objective.tokens, replay_examples))
        return sum(map(self.objective.tokens, examples)) + replayed

    def _skip(self, row: dict[str, Any], lines: list[int]) -> None:
        """End an update without touching the adapters, because of these lines of the train pairs
        or, if there are none, because of the replay.

        Raises Stopped when it is one too many in a row.
        """
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row == MAX_SKIPPED:
            section = "sft" if state.phase == objectives.SFT else "train"
            cause, remedy = (
                (f"the pairs on lines {lines} of {self.config.data.train_pairs}", "look at them")
                if lines
                else ("the base model's own answers", "set train.replay: 0")
            )
            state.stopped = [
                f"{MAX_SKIPPED} updates in a row gave NaN or an infinity, the last one from "
                f"{cause}; {remedy}, or lower {section}.learning_rate"
            ]
        self._end_update({**row, "skipped_updates": state.skipped, "skipped_lines": lines})
        self._raise_if_stopped()

    def _end_update(self, row: dict[str, Any]) -> None:
        """Report an update, and save a checkpoint when one is due."""
        self.metrics.on_train_loss_report(row)
        self.state.update += 1
        self.state.evaluated, self.state.measures = False, None
        if self._is_save_due() or self._is_evaluation_due() or self.state.stopped:
            self._save()

    def _evaluate(self) -> None:
        """One evaluation: the answers, the valid pairs, report, guard, checkpoint."""
        state = self.state
        measures = state.measures = state.measures or self.measure_answers()
        scores = self._score_valid()
        if state.updates_of_phase == 0:
            self._check_start(self.examples.valid, scores)
        metrics = summarise(scores, self.config.dpo.beta)
        self.metrics.on_val_loss_report(
            {
                "iteration": state.update,
                "phase": state.phase,
                **{f"eval_{name}": value for name, value in metrics.items()},
                **{f"eval_text/{name}": value for name, value in measures.means.items()},
            }
        )
        change = metrics["logps/chosen_change_per_token"]
        assert state.base is not None  # every phase begins with it
        crossed = crossed_limits(self.config.guard, state.base, measures, change)
        evaluation = state.last = Evaluation(state.update, measures)
        state.best = better(state.best, evaluation, crossed)
        if state.phase == objectives.SFT or state.updates_of_phase == 0:
            state.end_of_sft = evaluation
        state.evaluated = True
        if self.config.guard.enabled:
            state.stopped = crossed
        self._save()
        self._raise_if_stopped()

    def _score_valid(self) -> list[PairScore]:
        examples = self.examples.valid
        policy = log_probs(self.worker, [example.pair for example in examples])
        return [
            score_against(pi, example.pair, example.reference, self.config.dpo)
            for pi, example in zip(policy, examples, strict=True)
        ]

    def _is_evaluation_due(self) -> bool:
        """Whether an evaluation comes before the next update."""
        updates = self.state.updates_of_phase
        every = self.config.train.eval_every or updates_between_evaluations(self.updates)
        return (updates % every == 0 or updates == self.updates) and not self.state.evaluated

    def _is_save_due(self) -> bool:
        every = self.config.train.save_every
        if every is None:
            return self.save_clock.is_due()
        return self.state.updates_of_phase % every == 0

    def _save(self) -> None:
        """Save a checkpoint, unless the run had no evaluation yet: there is no best one then."""
        if self.state.best is None:
            return
        self.state.rows = self.metrics.rows
        with self.save_clock.saving(checkpoint.size(self.model)):
            self.checkpoints.save(self.state, self.model, self.config.lora, self.optimizer)

    def _raise_if_stopped(self) -> None:
        if self.state.stopped:
            raise Stopped(self.state.stopped)

    def _check_start(self, examples: list[Example], scores: list[Any]) -> None:
        """Check that the policy starts at the reference: the margin is 0, DPO's loss ln 2.

        On one machine the same kernels compute both, so they are equal. Several machines may round
        differently. Raises UserError for a difference that rounding does not explain, and prints a
        line for a smaller one that one machine should not have.
        """
        largest = 0.0
        for example, score in zip(examples, scores, strict=True):
            if isinstance(score, PairScore):  # SFT's train pairs have no reference
                largest = max(largest, self._start_difference(example.pair, score))
        if largest > MIN_DIFFERENCE:
            reason = (
                "different machines round differently, which is harmless"
                if self.worker.size > self.worker.local_processes
                else "rounding can explain that, so training goes on. On one machine they should "
                "be equal; please report it with the output of ./train_dpo_run1.sh --selftest"
            )
            print(
                f"10: before the first update the policy's log-probs are up to {largest:.2g} nats "
                f"off the reference's: {reason}"
            )

    def _start_difference(self, pair: EncodedPair, score: PairScore) -> float:
        """The larger difference of a pair's two sides from the reference, in nats."""
        largest, dtype = 0.0, dtype_of(self.model)
        for side, pi, ref in zip(pair.sides, score.pi, score.ref, strict=True):
            if not math.isfinite(pi):
                continue  # the update will be skipped and name this pair
            difference = abs(float(pi) - float(ref))
            limit = rounding_limit(side.answer_length, dtype)
            if not difference <= limit:
                raise UserError(self._start_fault(pair, side, float(pi), difference, limit))
            largest = max(largest, difference)
        return largest

    def _start_fault(
        self, pair: EncodedPair, side: EncodedAnswer, pi: float, difference: float, limit: float
    ) -> str:
        """Why the policy does not start at the reference: a wrong file or a wrong computation."""
        where = f"{self.config.run.references}: pair on line {pair.line}: "
        gap = f"{difference:.3g} nats off, and rounding explains only {limit:.2g}"
        without_gradient = self.worker.log_probs([side])[0]
        if abs(without_gradient - pi) <= limit:
            return (
                f"{where}the stored log-prob is {gap}: the file is damaged or belongs to another "
                "model; delete that folder and run 10_train_dpo.py again"
            )
        return (
            f"{where}the model scores one answer {without_gradient:.2f} without and {pi:.2f} with "
            f"a gradient ({gap}). This is a bug in the pipeline or in MLX on {device.name()}, not "
            "in your data; please report it with the output of ./train_dpo_run1.sh --selftest"
        )
