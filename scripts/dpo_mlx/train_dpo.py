"""Stage 10: pairs in, adapters out; the reference first, then training."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import numpy as np

from . import (
    checkpoint,
    device,
    diagnose,
    digest,
    durable,
    fingerprint,
    jsonl,
    metrics,
    models,
    ownership,
    results,
)
from . import config as configs
from .checkpoint import Checkpoints, Origin, State
from .config import Config
from .errors import UserError
from .fingerprint import DPO_ADAPTERS, JUDGEMENT, SFT_ADAPTERS, TRAINING, Fingerprint
from .guard import Guard
from .job import Job, load_reference, prepare
from .model_files import ADAPTERS
from .phase import DPO, PHASES, SFT, Dpo, Example, Sft, count_updates, pairs_per_update
from .reference import Reference
from .results import Outcome
from .run_folder import AFTER_SFT, BASE, SPLITS, TRAIN, VALID
from .trainer import Stopped, Trainer
from .writing import Measures, Watch

PRECOMPUTE, TRAIN_ONLY, ALL = "precompute", "train", "all"

PHASE_ADAPTERS = {SFT: SFT_ADAPTERS, DPO: DPO_ADAPTERS}

# At once on the disk: the last two, one that is written, the end of SFT, and the best of each of
# these three; the adapters that are kept count as another.
MOST_CHECKPOINTS = 8


class Refused(UserError):
    """The preflight found what is sure to waste the run."""


def train_dpo(config: Config, stage: str) -> bool:
    """Run stage 10, PRECOMPUTE, TRAIN_ONLY or ALL of it; whether training reached its end.

    Raises UserError for pairs, a model or settings that cannot be trained, and for TRAIN_ONLY
    without a reference.
    """
    run, current = config.run, fingerprint.of(TRAINING, config)
    stamp, outputs = run.stamp(TRAINING), [run.adapters, run.outcome, run.metrics]
    if stage != PRECOMPUTE and fingerprint.is_current(stamp, current, outputs):
        print(f"10: {run.adapters} is up to date, skipped")
        return _say(results.read_outcome(run), run.adapters)
    ownership.require_untouched(run.adapters)
    job = prepare(config, current)
    _require_space(job)
    phases = Phases(job)
    preflight(job, only_read=stage == TRAIN_ONLY)
    end = _run(phases, stage)
    if end is None:
        return True
    results.write_outcome(run, end)
    fingerprint.write(stamp, job.fingerprint)
    _refuse_changes(job.fingerprint, fingerprint.of(TRAINING, config), run.adapters)
    return _say(end, run.adapters)


def _require_space(job: Job) -> None:
    """Raises UserError when the disk has no room for the checkpoints."""
    size = MOST_CHECKPOINTS * checkpoint.size(job.model) + durable.SMALL_FILES
    durable.require_space(job.config.run.path, size, "run_dir")


def _refuse_changes(before: Fingerprint, after: Fingerprint, adapters: Path) -> None:
    """Raises UserError when files were changed while they were trained on."""
    if changed := fingerprint.differences(before, after):
        raise UserError(
            f"{adapters}: are of the files as they were when training began, which were changed "
            f"since ({'; '.join(changed)}); run 10_train_dpo.py again to train on them as they are"
        )


def _say(end: Outcome, adapters: Path) -> bool:
    for reason in end.stopped:
        print(f"10: stopped after update {end.updates}: {reason}")
    if end.stopped:
        print(
            "10: this is a finding: lower train.learning_rate (and sft.learning_rate), or raise "
            "dpo.beta or dpo.nll_weight"
        )
    print(
        f"10: {end.updates} updates; {adapters} holds those of update {end.kept_update}, "
        f"whose answers are most in the voice (score {end.voice:.2f}; the more fluent of those "
        "that are alike) and within guard's limits"
    )
    return not end.stopped


def preflight(job: Job, only_read: bool = False) -> list[diagnose.Finding]:
    """Say what the run will do and what is wrong with it, from the pairs, the base model's
    log-probs of the valid ones, and the gradients of a few.

    Raises UserError for what is sure to waste the run, unless `train.force`; with `only_read` also
    when those log-probs are not there yet.
    """
    config, encoded = job.config, job.preferences
    base = load_reference(job, BASE, VALID, only_read=only_read)
    with models.gradient_checkpointing(job.model, config.train.grad_checkpoint):
        probed = diagnose.probe(job.worker.engine, config, encoded[TRAIN], encoded[VALID])
    facts = diagnose.gather(config, job.raw, encoded, base, job.classifier, probed)
    _describe(job, facts, probed)
    found = list(diagnose.findings(facts, config))
    for finding in found:
        print(f"10: {'sure to fail: ' if finding.fatal else 'note: '}{finding.text}")
    if any(finding.fatal for finding in found) and not config.train.force:
        raise Refused(
            "the preflight found what is sure to waste the run, see above; change these settings, "
            "or --set train.force=true to run all the same"
        )
    return found


def _describe(job: Job, facts: diagnose.Facts, probed: diagnose.Probe) -> None:
    config = job.config
    for split in SPLITS:
        lengths = [pair.length for pair in job.pairs[split]]
        print(
            f"10: {len(lengths)} {split} pairs, the longer side median {np.median(lengths):.0f}, "
            f"longest {max(lengths)} tokens"
        )
    print(
        f"10: the base model gives chosen answers {facts.chosen_per_token:.2f} nats a token, "
        f"rejected ones {facts.rejected_per_token:.2f}; median lengths "
        f"{facts.chosen_tokens:.0f} and {facts.rejected_tokens:.0f} tokens"
    )
    print(
        f"10: the classifier of the voice is right on {facts.classifier_accuracy:.0%} of held-out "
        "answers"
    )
    if facts.sft_updates:
        print(
            f"10: SFT: {facts.sft_updates} updates of {pairs_per_update(config.train)} chosen "
            f"answers, learning rate {config.sft.learning_rate:g}: about "
            f"{facts.sft_change:+.2g} nats a token on unseen answers, at first order"
        )
    print(
        f"10: DPO: {facts.dpo_updates} updates of {pairs_per_update(config.train)} pairs, learning "
        f"rate {config.train.learning_rate:g}, loss {config.dpo.loss}, beta {config.dpo.beta:g}: "
        f"about {facts.dpo_change:+.2g} nats a token between the sides"
    )
    print(
        f"10: about {_seconds(job, probed) / 60:.0f} minutes, plus the answers of each evaluation; "
        f"peak memory {job.need}; {device.available() / 1e9:.2f} GB available"
    )


def _seconds(job: Job, probed: diagnose.Probe) -> float:
    """Of both phases and the reference, whose forward pass is a third of a gradient's cost."""
    config, train = job.config, job.preferences[TRAIN]
    chosen = sum(len(pair.chosen.ids) for pair in train)
    both = chosen + sum(len(pair.rejected.ids) for pair in train)
    passes = config.sft.epochs * chosen + (config.train.epochs + 1 / 3) * both
    return passes * probed.seconds


def _run(phases: Phases, stage: str) -> Outcome | None:
    """Train what `stage` asks for; None when that was no more than the reference."""
    config = phases.job.config
    try:
        if config.sft.epochs:
            phases.warm_up(only_read=stage == TRAIN_ONLY)
        references = phases.references(only_read=stage == TRAIN_ONLY)
        if stage == PRECOMPUTE:
            _keep_settings(config)
            return None
        phases.align(references)
        updates, stopped = phases.updates, []
    except Stopped as stop:
        updates, stopped = stop.update, stop.reasons
    return _keep_best(phases, updates, stopped)


def _keep_best(phases: Phases, updates: int, stopped: list[str]) -> Outcome:
    """Put the best adapters into the run's folder."""
    best, folder = phases.guard.kept, phases.job.config.run.adapters
    path = phases.checkpoints.best(best.update)
    checkpoint.require_unchanged(path)
    models.copy_adapters(path, folder)
    return Outcome(updates, best.update, best.voice, stopped, digest.of_file(folder / ADAPTERS))


def _keep_settings(config: Config) -> None:
    """The resolved settings, beside what they make."""
    jsonl.write_text(config.run.settings, configs.dump(config))


class Phases:
    """SFT and DPO over one job, judged by the answers to the same questions; each goes on from the
    newest checkpoint that depends on the same files and settings.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        asked = job.raw[VALID][: job.config.train.eval_questions]
        self.watch = Watch(
            job.worker, job.encoder, job.classifier, asked, job.generation, job.config.seed
        )
        self.sft, self.dpo = Sft(job.config), Dpo(job.config)
        self.first = count_updates(self.sft.settings, len(job.pairs[TRAIN]))
        self.updates = self.first + count_updates(self.dpo.settings, len(job.pairs[TRAIN]))
        self.checkpoints = Checkpoints(job.config.run.checkpoints)
        self.checkpoints.prune()
        self._found = {phase: self._look_for(phase) for phase in PHASES}
        self._after_sft = State(SFT)

    @cached_property
    def guard(self) -> Guard:
        return Guard(self.base, self.job.config.guard)

    @cached_property
    def base(self) -> Measures:
        """What the base model writes."""
        print("10: the base model answers the questions of the evaluations")
        return self.watch.base()

    def warm_up(self, only_read: bool) -> None:
        """SFT, unless it is at its end already. Raises UserError when it is not and `only_read`."""
        job, found = self.job, self._found[SFT]
        if found and self._is_sft_s_end(found[1]):
            models.load_adapters(job.model, found[0])
            self._after_sft = found[1]
            if self._after_sft.base:
                self._take_up_guard(self._after_sft)
            return
        if only_read:
            raise UserError(
                f"{self.checkpoints.folder}: no adapters of SFT with these settings; run "
                "10_train_dpo.py --stage precompute first"
            )
        unread = Reference(math.nan, math.nan)  # SFT looks at no reference of a train pair
        examples = {
            TRAIN: [Example(pair, unread) for pair in job.pairs[TRAIN]],
            VALID: _examples(job, VALID, load_reference(job, BASE, VALID)),
        }
        self._after_sft = self._train(self.sft, examples, State(SFT))

    def references(self, only_read: bool) -> dict[str, list[Reference]]:
        """The reference of both splits: of the base model, or as SFT has left it."""
        warm = self.checkpoints.path(SFT, self.first)
        taken_of, adapters = (AFTER_SFT, warm) if self.first else (BASE, None)
        return {s: load_reference(self.job, taken_of, s, adapters, only_read) for s in SPLITS}

    def align(self, references: dict[str, list[Reference]]) -> None:
        """DPO."""
        examples = {split: _examples(self.job, split, references[split]) for split in SPLITS}
        self._train(self.dpo, examples, self._after_sft)

    def _train(
        self,
        phase: Sft | Dpo,
        examples: dict[str, list[Example]],
        begin: State,
    ) -> State:
        """A phase to its end, from where the one before left the run, or from what was found."""
        config, found = self.job.config, self._found[phase.name]
        _keep_settings(config)
        reporters = metrics.reporters(config)
        if found:
            self._take_up_guard(found[1])
        else:
            self.checkpoints.clear(phase.name if self.first else SFT)
            self._found[DPO] = None
        trainer = Trainer(
            self.job.worker,
            config,
            phase,
            examples[TRAIN],
            examples[VALID],
            metrics.Callbacks(),
            self.watch,
            self.guard,
            begin.update,
            begin.rows,
            origin_of(self.job, phase.name),
        )
        written = begin.written or None
        if found:
            print(f"10: going on from {found[0]}")
            trainer.resume(*found)
            written = None
        elif not begin.update:  # before the first update of all the model is the base model
            written = self.base
        # Only now, as a checkpoint that cannot be used must leave the file as it is.
        metrics_file = metrics.MetricsFile(config.run.metrics, trainer.state.rows)
        bar = metrics.ProgressBar(trainer.state.update, self.updates)
        trainer.callback = metrics.Callbacks(metrics_file, bar, *reporters)
        try:
            with ownership.growing(config.run.metrics):
                trainer.run(written)
        finally:
            bar.close()
        return trainer.state

    def _look_for(self, phase: str) -> tuple[Path, State] | None:
        """The newest checkpoint of a phase and where it is, when this run can go on from it.

        The end of SFT serves however it is judged now. Raises UserError for a checkpoint of other
        inputs, unless the run that made it came to its end or `train.restart` is set.
        """
        path = self.checkpoints.newest(phase)
        if path is None:
            return None
        state, origin = checkpoint.read(path)
        mine = origin_of(self.job, phase)
        changed = fingerprint.differences(origin.adapters, mine.adapters)
        judged_anew = fingerprint.differences(origin.judgement, mine.judgement)
        if judged_anew and self._is_sft_s_end(state):
            state = State(SFT, state.update, state.rows, evaluated=True)
        else:
            changed += judged_anew
        if not changed:
            return path, state
        if not (self.job.config.train.restart or self._is_finished(origin)):
            raise UserError(
                f"{path}: an unfinished run was trained otherwise ({'; '.join(changed)}); set that "
                "back, set run_dir to another folder, or --set train.restart=true to begin anew"
            )
        print(f"10: {path} is not gone on from, it was trained otherwise: {'; '.join(changed)}")
        return None

    def _is_sft_s_end(self, state: State) -> bool:
        at_end = state.phase == SFT and state.update == self.first
        return at_end and state.evaluated and not state.stopped

    def _is_finished(self, origin: Origin) -> bool:
        """Whether the adapters in the run's folder came of a run with this origin."""
        made = fingerprint.read(self.job.config.run.stamp(TRAINING)) or {}
        known = {**origin.adapters, **origin.judgement}
        return all(made.get(name) == value for name, value in known.items())

    def _take_up_guard(self, state: State) -> None:
        self.guard = Guard(state.base, self.job.config.guard, state.best)


def origin_of(job: Job, phase: str) -> Origin:
    return Origin(
        fingerprint.of(PHASE_ADAPTERS[phase], job.config, job.fingerprint),
        fingerprint.of(JUDGEMENT, job.config),
    )


def _examples(job: Job, split: str, references: list[Reference]) -> list[Example]:
    """Of a split's pairs; of the valid ones those that evaluations look at, the first ones."""
    encoded = job.preferences[TRAIN] if split == TRAIN else job.watched
    return [Example(*both) for both in zip(encoded, references[: len(encoded)], strict=True)]
