"""Stage 10: pairs in, adapters out; the reference first, then training."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

from .. import config as configs
from ..config import Config
from ..data.encoding import EncodedPair
from ..files import atomic, digest, fingerprint, jsonl, ownership, results
from ..files.errors import UserError
from ..files.fingerprint import DPO_ADAPTERS, JUDGEMENT, SFT_ADAPTERS, TRAINING, Fingerprint
from ..files.model_files import ADAPTERS
from ..files.results import Outcome
from ..files.run_folder import AFTER_SFT, BASE, SPLITS, TRAIN, VALID
from ..model.adapters import copy_adapters, load_adapters
from ..scoring.losses import Sides
from ..scoring.objectives import DPO, PHASES, SFT, Example, Sft
from ..training import checkpoint, metrics
from ..training.checkpoint import Checkpoints, Origin, State
from ..training.preflight import preflight
from ..training.schedule import count_updates
from ..training.setup import Setup, load_reference, prepare
from ..training.trainer import Examples, Stopped, Trainer
from ..voice.answers import AnswerEvaluator, Measures

# The parts of stage 10 that can be run alone.
ONLY_REFERENCE, ONLY_TRAINING = "reference", "training"

PHASE_ADAPTERS = {SFT: SFT_ADAPTERS, DPO: DPO_ADAPTERS}

# The most on the disk at a time: the newest two, the one being saved, the end of SFT, up to three
# that are the best for one of these, and the adapters that the run keeps.
MOST_CHECKPOINTS = 8


def train_dpo(config: Config, only: str | None = None) -> bool:
    """Run stage 10, or only one part of it. Returns whether training reached its end.

    Raises UserError for pairs, a model or settings that cannot be trained, and for ONLY_TRAINING
    without a reference.
    """
    run, current = config.run, fingerprint.of(TRAINING, config)
    stamp, outputs = run.stamp(TRAINING), [run.adapters, run.outcome, run.metrics]
    if only != ONLY_REFERENCE and fingerprint.is_current(stamp, current, outputs):
        print(f"10: {run.adapters} is up to date, skipped")
        return _say(results.read_outcome(run), run.adapters)
    ownership.require_untouched(run.adapters)
    setup = prepare(config, current)
    _require_space(setup)
    phases = Phases(setup)
    preflight(setup, only_read=only == ONLY_TRAINING)
    end = _run(phases, only)
    if end is None:
        return True
    results.write_outcome(run, end)
    fingerprint.write(stamp, setup.fingerprint)
    _refuse_changes(setup.fingerprint, fingerprint.of(TRAINING, config), run.adapters)
    return _say(end, run.adapters)


def _require_space(setup: Setup) -> None:
    """Raises UserError when the disk has no room for the checkpoints."""
    size = MOST_CHECKPOINTS * checkpoint.size(setup.model) + atomic.SMALL_FILES
    atomic.require_space(setup.config.run.path, size, "run_dir")


def _refuse_changes(before: Fingerprint, after: Fingerprint, adapters: Path) -> None:
    """Raises UserError when the input files changed while training ran."""
    if changed := fingerprint.differences(before, after):
        raise UserError(
            f"{adapters}: the input files changed while training ran ({'; '.join(changed)}), and "
            "these adapters were trained on the old ones; run 10_train_dpo.py again to train on "
            "the new ones"
        )


def _say(end: Outcome, adapters: Path) -> bool:
    """Print how training ended. Returns whether it reached its end."""
    for reason in end.stopped:
        print(f"10: stopped after update {end.updates}: {reason}")
    if end.stopped:
        print(
            "10: this is a finding: lower train.learning_rate (and sft.learning_rate), or raise "
            "dpo.beta or dpo.nll_weight"
        )
    print(
        f"10: kept update {end.kept_update} of {end.updates}: voice {end.voice:.2f}; the adapters "
        f"are in {adapters}"
    )
    return not end.stopped


def _run(phases: Phases, only: str | None) -> Outcome | None:
    """Train what `only` asks for. None when it asks for no more than the reference."""
    config, only_read = phases.setup.config, only == ONLY_TRAINING
    stopped: list[str] = []
    try:
        if config.sft.epochs:
            phases.run_sft(only_read)
        references = phases.references(only_read)
        if only == ONLY_REFERENCE:
            _keep_settings(config)
            return None
        phases.run_dpo(references)
    except Stopped as stop:
        stopped = stop.reasons
    return _keep_best(phases, stopped)


def _keep_best(phases: Phases, stopped: list[str]) -> Outcome:
    """Copy the best checkpoint's adapters to the run's folder."""
    state, folder = phases.state, phases.setup.config.run.adapters
    assert state.best is not None  # every phase begins with an evaluation
    path = phases.checkpoints.best(state.best.update)
    checkpoint.require_unchanged(path)
    copy_adapters(path, folder)
    best, sha256 = state.best, digest.of_file(folder / ADAPTERS)
    return Outcome(state.update, best.update, best.voice, stopped, sha256)


def _keep_settings(config: Config) -> None:
    """Write the resolved settings to the run's folder."""
    jsonl.write_text(config.run.settings, configs.dump(config))


class Phases:
    """Runs SFT and DPO over one setup.

    Each phase resumes from its newest checkpoint if that depends on the same files and settings.
    `state` says where the run is.
    """

    def __init__(self, setup: Setup) -> None:
        config = setup.config
        self.setup = setup
        questions = setup.raw[VALID][: config.train.eval_questions]
        self.evaluator = AnswerEvaluator(
            setup.worker, setup.encoder, setup.classifier, questions, setup.generation, config.seed
        )
        pairs = len(setup.pairs[TRAIN])
        self.sft_updates = count_updates(Sft(config).settings, pairs)
        self.updates = self.sft_updates + count_updates(config.train, pairs)
        origins = {phase: _origin(setup, phase) for phase in PHASES}
        self.checkpoints = Checkpoints(config.run.checkpoints, origins)
        self.checkpoints.prune()
        self._resumable = {phase: self._find_resumable(phase) for phase in PHASES}
        self.state = State(SFT)

    @cached_property
    def base(self) -> Measures:
        """The measures of the base model's answers."""
        print("10: the base model answers the questions of the evaluations")
        return self.evaluator.base()

    def run_sft(self, only_read: bool) -> None:
        """Train SFT, or load its adapters if it has ended already.

        Raises UserError when it has not ended and `only_read` is set.
        """
        resumable = self._resumable[SFT]
        if resumable and self._is_end_of_sft(resumable[1]):
            path, self.state = resumable
            load_adapters(self.setup.model, path)
            return
        if only_read:
            raise UserError(
                f"{self.checkpoints.folder}: no adapters of SFT with these settings; run "
                "10_train_dpo.py --only reference first"
            )
        no_reference = Sides(math.nan, math.nan)  # SFT needs none for its train pairs
        train = [Example(pair, no_reference) for pair in self.setup.pairs[TRAIN]]
        valid = _examples(self.setup.watched, load_reference(self.setup, BASE, VALID))
        self._train(SFT, Examples(train, valid))

    def references(self, only_read: bool) -> dict[str, list[Sides[float]]]:
        """DPO's reference for both splits: the model after SFT, or the base model without SFT."""
        end_of_sft = self.checkpoints.path(SFT, self.sft_updates)
        model, adapters = (AFTER_SFT, end_of_sft) if self.sft_updates else (BASE, None)
        return {s: load_reference(self.setup, model, s, adapters, only_read) for s in SPLITS}

    def run_dpo(self, references: dict[str, list[Sides[float]]]) -> None:
        """Train DPO, from where SFT has left the run."""
        train = _examples(self.setup.preferences[TRAIN], references[TRAIN])
        valid = _examples(self.setup.watched, references[VALID])
        self._train(DPO, Examples(train, valid))

    def _train(self, phase: str, examples: Examples) -> None:
        """Run a phase to its end, from its checkpoint or from its beginning."""
        config, worker = self.setup.config, self.setup.worker
        path = config.run.metrics
        _keep_settings(config)
        reporters = metrics.reporters(config)
        checkpoint_path, self.state = self._resumable[phase] or (None, self._begin(phase))
        bar = metrics.ProgressBar(self.state.update, self.updates)
        metrics_file = metrics.MetricsFile(path, bar, *reporters)
        trainer = Trainer(
            worker, config, examples, self.evaluator, metrics_file, self.checkpoints, self.state
        )
        if checkpoint_path:
            print(f"10: resuming from {checkpoint_path}")
            checkpoint.restore(checkpoint_path, worker.model, trainer.optimizer)
        # Only now: a checkpoint that cannot be used must leave the file as it is.
        metrics_file.keep_first(self.state.rows)
        with ownership.growing(path), bar:
            trainer.run()

    def _begin(self, phase: str) -> State:
        """Where a phase without a checkpoint begins. Removes checkpoints of earlier runs."""
        self.checkpoints.clear(phase if self.sft_updates else SFT)
        self._resumable[DPO] = None
        state = self.state.at_phase(phase)
        state.base = state.base or self.base
        if not state.update:  # the model still answers as the base model does
            state.measures = state.base
        return state

    def _find_resumable(self, phase: str) -> tuple[Path, State] | None:
        """(path, state) of a phase's newest checkpoint, if this run can resume from it.

        Raises UserError for a checkpoint of other inputs, unless the run that made it has finished
        or `train.restart` is set.
        """
        path = self.checkpoints.newest(phase)
        if path is None:
            return None
        state, origin = checkpoint.read(path)
        mine = self.checkpoints.origins[phase]
        changed = fingerprint.differences(origin.adapters, mine.adapters)
        judgement_changed = fingerprint.differences(origin.judgement, mine.judgement)
        if judgement_changed and self._is_end_of_sft(state):
            # SFT's adapters are the same however they are judged: forget only the judgement.
            state = State(SFT, update=state.update, rows=state.rows, evaluated=True)
        else:
            changed += judgement_changed
        if not changed:
            return path, state
        if not (self.setup.config.train.restart or self._is_finished(origin)):
            raise UserError(
                f"{path}: an unfinished run used other settings or pairs ({'; '.join(changed)}); "
                "set them back, set run_dir to another folder, or --set train.restart=true to "
                "start again"
            )
        print(f"10: not resuming from {path}, which used other inputs: {'; '.join(changed)}")
        return None

    def _is_end_of_sft(self, state: State) -> bool:
        at_end = state.phase == SFT and state.update == self.sft_updates
        return at_end and state.evaluated and not state.stopped

    def _is_finished(self, origin: Origin) -> bool:
        """Whether a run with this origin made the adapters in the run's folder."""
        inputs = fingerprint.read(self.setup.config.run.stamp(TRAINING)) or {}
        wanted = {**origin.adapters, **origin.judgement}
        return all(inputs.get(name) == value for name, value in wanted.items())


def _origin(setup: Setup, phase: str) -> Origin:
    """What a phase's checkpoints depend on."""
    return Origin(
        fingerprint.of(PHASE_ADAPTERS[phase], setup.config, setup.fingerprint),
        fingerprint.of(JUDGEMENT, setup.config),
    )


def _examples(pairs: list[EncodedPair], references: list[Sides[float]]) -> list[Example]:
    """Pairs with their reference, which may cover more pairs than these."""
    return [Example(*both) for both in zip(pairs, references[: len(pairs)], strict=True)]
