"""What bench_outcome.py runs: trains recipes, saves their models' answers, and reports on them."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import control
import numpy as np
from dpo_mlx.config import Config
from dpo_mlx.data import pairs
from dpo_mlx.data.encoding import EncodedAnswer, Encoder
from dpo_mlx.data.pairs import LENGTH, STOP
from dpo_mlx.files import jsonl, records, results
from dpo_mlx.files.results import Measures
from dpo_mlx.files.run_folder import TRAIN, VALID, RunFolder
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.sampling import Answer
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.report import sections
from dpo_mlx.report.sections import BASE, CHOSEN, TUNED
from dpo_mlx.report.verdict import verdict
from dpo_mlx.scoring.objectives import DPO, SFT
from dpo_mlx.stages.evaluate import sample_answers
from dpo_mlx.stages.sweep import copy_common_parts
from dpo_mlx.stages.train_dpo import train_dpo
from dpo_mlx.training.checkpoint import Checkpoints
from dpo_mlx.training.setup import answer_settings
from dpo_mlx.voice import cost, intervals
from dpo_mlx.voice.answers import Author, measure
from dpo_mlx.voice.fluency import longest_loop

ANSWERS = "answers.json"
# The parts of a run that a report has.
SHOWN = ("updates", "kept_update", "stopped", "minutes", "is_partial", "caught")


@dataclass(frozen=True)
class Output:
    """A model's answers to the held-out questions, and its results on unrelated tasks."""

    answers: list[Answer]
    unrelated: cost.ModelResults


@dataclass(frozen=True)
class Run:
    """How a run ended, and what its models answer: the contents of answers.json.

    `adapters` is the SHA-256 of the kept ones. `is_partial` says that a part of the training was
    there already, so that `minutes` leaves it out. `caught` is about the control.
    """

    adapters: str
    updates: int
    sft_updates: int
    kept_update: int
    stopped: list[str]
    minutes: float | None
    is_partial: bool
    kept: Output
    end_of_sft: Output | None
    caught: list[str] = field(default_factory=list)

    @property
    def at_end_of_sft(self) -> Run | None:
        """The run as if SFT had been all. None without SFT."""
        if self.end_of_sft is None:
            return None
        return replace(
            self,
            updates=self.sft_updates,
            kept_update=self.sft_updates,
            stopped=[],
            minutes=None,
            kept=self.end_of_sft,
            end_of_sft=None,
        )


@dataclass(frozen=True)
class BaseModel:
    """The base model's answers to unrelated prompts, as token ids after their prompts, and its
    results on unrelated tasks: the contents of base.json.
    """

    ids: list[list[int]]
    prompt_lengths: list[int]
    unrelated: cost.ModelResults

    @property
    def answers(self) -> list[EncodedAnswer]:
        both = zip(self.ids, self.prompt_lengths, strict=True)
        return [EncodedAnswer(tuple(ids), prompt_length) for ids, prompt_length in both]


def read(folder: Path) -> Run | None:
    """The saved answers of a run. None when there are none."""
    run: Run | None = records.read_if_exists(folder / ANSWERS, Run)
    return run


def run_recipe(config: Config, questions: Questions) -> None:
    """Run stage 10 and save what its models answer, unless that has been done."""
    folder = config.run.path
    copy_common_parts(
        config, [RunFolder(path.parent) for path in folder.parent.glob(f"*/{ANSWERS}")]
    )
    checkpoints = Checkpoints(config.run.checkpoints)
    is_partial = any(checkpoints.newest(phase) for phase in (SFT, DPO))
    started = time.perf_counter()
    train_dpo(config)
    minutes = (time.perf_counter() - started) / 60
    outcome, saved = results.read_outcome(config.run), read(folder)
    if saved and saved.adapters == outcome.adapters:
        return
    kept, end_of_sft = questions.ask(config.run.adapters), None
    if outcome.end_of_sft is not None:
        update = outcome.end_of_sft.update
        is_kept = update == outcome.kept_update
        end_of_sft = kept if is_kept else questions.ask(checkpoints.path(SFT, update))
    run = Run(
        outcome.adapters,
        outcome.updates,
        outcome.sft_updates,
        outcome.kept_update,
        outcome.stopped,
        minutes,
        is_partial,
        kept,
        end_of_sft,
    )
    jsonl.write_json(folder / ANSWERS, asdict(run))


def run_control(config: Config, questions: Questions) -> None:
    """Train the run that collapsed, and save what its last adapters answer to prompts like its own,
    unless that has been done.
    """
    path = config.run.path / ANSWERS
    if path.exists():
        return
    started = time.perf_counter()
    training = control.train(config)
    minutes = (time.perf_counter() - started) / 60
    updates, kept = training.updates, questions.ask(training.adapters, training.encoder)
    run = Run("", updates, 0, updates, [], minutes, False, kept, None, training.caught)
    jsonl.write_json(path, asdict(run))


class SavedLogProbs:
    """The base model's log-probs in a file, so that measuring answers again needs no model."""

    def __init__(self, path: Path, worker: Worker) -> None:
        self.path = path
        self.worker = worker
        self.values: dict[str, float] = jsonl.read_json(path) if path.exists() else {}

    def __call__(self, sequences: list[EncodedAnswer]) -> list[float]:
        keys = [hashlib.sha256(repr(sequence).encode()).hexdigest() for sequence in sequences]
        missing = {k: s for k, s in zip(keys, sequences, strict=True) if k not in self.values}
        if missing:
            log_probs = self.worker.log_probs(list(missing.values()))
            self.values |= dict(zip(missing, log_probs, strict=True))
            jsonl.write_json(self.path, self.values)
        return [self.values[key] for key in keys]


class Questions:
    """The held-out questions of a seed: asks them of models, and reports on the answers beside the
    base model's and the author's.
    """

    def __init__(self, config: Config) -> None:
        self.pairs = {split: pairs.read(path) for split, path in config.pairs.splits.items()}
        self.author = Author.of(self.pairs[TRAIN], self.pairs[VALID])
        loaded = load_model(config.model, lazy=True)
        self.base_worker = Worker(loaded.model, loaded.tokenizer)
        self.encoder = Encoder.of(loaded.tokenizer, config)
        generation = answer_settings(config, self.pairs, self.encoder)
        self.config = replace(config, generation=generation)
        self.log_probs = SavedLogProbs(config.run.path / "log_probs.json", self.base_worker)
        self.tasks = cost.load(config.smoke.unrelated_tasks)
        held_out = self.pairs[VALID]
        self.answers = {
            BASE: [self._answer(pair.rejected, pair.rejected_finish) for pair in held_out],
            CHOSEN: [self._answer(pair.chosen, STOP) for pair in held_out],
        }
        self.measures = {who: self._measure(answers) for who, answers in self.answers.items()}

    def _answer(self, text: str, finish: str) -> Answer:
        return Answer(text, finish, len(self.encoder.answer_ids(text, LENGTH)))

    def _measure(self, answers: list[Answer]) -> Measures:
        return measure(answers, self.pairs[VALID], self.author, self.log_probs, self.encoder)

    def ask(self, adapters: Path, encoder: Encoder | None = None) -> Output:
        """What the model with these adapters answers. `encoder` is of the held-out questions."""
        loaded = load_model(self.config.model, adapters)
        worker, questions = Worker(loaded.model, loaded.tokenizer), self.pairs[VALID]
        answers = sample_answers(worker, questions, encoder or self.encoder, self.config)
        return Output(answers, self._unrelated(worker, self.base.answers))

    @cached_property
    def base(self) -> BaseModel:
        """The base model's side of the unrelated tasks, which all runs share."""
        path = self.config.run.path / "base.json"
        if not path.exists():
            seed, size = self.config.seed, self.config.generation.batch_size
            worker, prompts = self.base_worker, self.tasks.prompts
            answers = cost.base_answers(worker, self.encoder, prompts, size, seed)
            base = BaseModel(
                [list(answer.ids) for answer in answers],
                [answer.prompt_length for answer in answers],
                self._unrelated(worker, answers),
            )
            jsonl.write_json(path, asdict(base))
        return records.read(path, BaseModel)

    def _unrelated(self, worker: Worker, answers: list[EncodedAnswer]) -> cost.ModelResults:
        size = self.config.generation.batch_size
        return cost.measure(worker, self.encoder, self.tasks, answers, size)

    def report(self, run: Run) -> dict[str, Any]:
        """The report of stage 12 on a run, and what only the benchmark's table has."""
        answers = {**self.answers, TUNED: run.kept.answers}
        measures = {**self.measures, TUNED: self._measure(run.kept.answers)}
        train, voices = self.pairs[TRAIN], {who: m.voice for who, m in measures.items()}
        report = {
            "voice": sections.voice(self.author, train, answers, None),
            "fluency": sections.fluency(measures, train, answers),
            "habits": sections.habits(self.author, answers),
            "cost": cost.compare(self.base.answers, self.base.unrelated, run.kept.unrelated),
        }
        dpo_added = None
        if run.end_of_sft is not None:
            before = self._measure(run.end_of_sft.answers).voice
            dpo_added = intervals.difference(voices[TUNED], before).values
        return {
            "verdict": verdict(report, self.config.smoke),
            **report,
            "dpo_added": dpo_added,
            "above_base": float(np.mean(np.array(voices[TUNED]) > np.array(voices[BASE]))),
            "longest_loops": {
                who: [longest_loop(text) for text in sections.texts(side)]
                for who, side in answers.items()
            },
            **{name: value for name, value in vars(run).items() if name in SHOWN},
        }
