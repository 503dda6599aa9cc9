"""SFT and then DPO: what each phase trains on, and where it starts or resumes."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

from .. import config as configs
from ..data.encoding import EncodedPair
from ..files import digest, fingerprint, jsonl, ownership
from ..files.errors import UserError
from ..files.fingerprint import BEST_CHECKPOINT, DPO_ADAPTERS, SFT_ADAPTERS, TRAINING
from ..files.model_files import ADAPTERS
from ..files.results import Measures, Outcome
from ..files.run_folder import AFTER_SFT, BASE, SPLITS, TRAIN, VALID
from ..model.adapters import copy_adapters, load_adapters
from ..scoring.losses import Sides
from ..scoring.objectives import DPO, PHASES, SFT, Example, Sft
from ..voice import cost
from ..voice.answers import AnswerEvaluator
from . import checkpoint, metrics, replay
from .checkpoint import CheckpointFingerprints, Checkpoints, State
from .schedule import count_updates
from .setup import Setup, load_reference
from .trainer import Examples, Trainer

# Unrelated prompts on which an evaluation measures how far the model is from the base model: they
# take about as long as scoring the answers to the questions.
PROMPTS = 16

PHASE_ADAPTERS = {SFT: SFT_ADAPTERS, DPO: DPO_ADAPTERS}


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
            setup.worker,
            setup.encoder,
            setup.author,
            questions,
            cost.load(PROMPTS).prompts,
            setup.generation,
            config.seed,
        )
        pairs = len(setup.pairs[TRAIN])
        self.sft_updates = count_updates(Sft(config).settings, pairs)
        self.dpo_updates = count_updates(config.train, pairs)
        self.updates = self.sft_updates + self.dpo_updates
        fingerprints = {phase: _fingerprints(setup, phase) for phase in PHASES}
        self.checkpoints = Checkpoints(config.run.checkpoints, fingerprints)
        self.checkpoints.prune()
        self._resumable = {phase: self._find_resumable(phase) for phase in PHASES}
        self.state = State(SFT)

    @cached_property
    def base(self) -> Measures:
        """The measures of the base model's answers."""
        print("10: the base model answers the evaluation questions")
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
                f"{self.checkpoints.folder}: no finished SFT with these settings; run "
                "10_train_dpo.py --only reference first"
            )
        no_reference = Sides(math.nan, math.nan)  # SFT needs none for its train pairs
        train = [Example(pair, no_reference) for pair in self.setup.pairs[TRAIN]]
        valid = _examples(self.setup.evaluated_pairs, load_reference(self.setup, BASE, VALID))
        self._train(SFT, Examples(train, valid, self._replay_examples(self.sft_updates)))

    def _replay_examples(self, updates: int) -> list[Example]:
        """What a phase of so many updates replays."""
        count = updates * self.setup.config.train.replay
        return self._sampled_replay[:count] if count else []

    @cached_property
    def _sampled_replay(self) -> list[Example]:
        """The base model's answers to the unrelated prompts that the phases need."""
        setup, config = self.setup, self.setup.config
        count = max(self.sft_updates, self.dpo_updates) * config.train.replay
        print("10: the base model answers unrelated prompts, for the replay")
        return replay.base_examples(setup.worker, setup.encoder, count, config.seed)

    def references(self, only_read: bool) -> dict[str, list[Sides[float]]]:
        """DPO's reference for both splits: the model after SFT, or the base model without SFT."""
        end_of_sft = self.checkpoints.path(SFT, self.sft_updates)
        model, adapters = (AFTER_SFT, end_of_sft) if self.sft_updates else (BASE, None)
        return {s: load_reference(self.setup, model, s, adapters, only_read) for s in SPLITS}

    def run_dpo(self, references: dict[str, list[Sides[float]]]) -> None:
        """Train DPO from the end of SFT, or from the base model without SFT."""
        train = _examples(self.setup.dpo_pairs[TRAIN], references[TRAIN])
        valid = _examples(self.setup.evaluated_pairs, references[VALID])
        self._train(DPO, Examples(train, valid, self._replay_examples(self.dpo_updates)))

    def keep_best(self, stopped: list[str], notes: list[str]) -> Outcome:
        """Copy the best checkpoint's adapters to the run's folder. `stopped` says why training
        stopped early; it is empty otherwise. `notes` are the preflight's.
        """
        best, last, folder = self.state.best, self.state.last, self.setup.config.run.adapters
        assert best is not None and last is not None  # every phase begins with an evaluation
        path = self.checkpoints.best(best.update)
        checkpoint.require_unchanged(path)
        copy_adapters(path, folder)
        return Outcome(
            updates=self.state.update,
            sft_updates=self.sft_updates,
            end_of_sft=self.state.end_of_sft if self.sft_updates else None,
            last=last,
            kept=best,
            stopped=stopped,
            notes=notes,
            adapters=digest.of_file(folder / ADAPTERS),
        )

    def write_config(self) -> None:
        """Write the config with every key to the run's folder."""
        config = self.setup.config
        jsonl.write_text(config.run.config_copy, configs.dump(config))

    def _train(self, phase: str, examples: Examples) -> None:
        """Run a phase to its end, from its checkpoint or from its beginning."""
        config, worker = self.setup.config, self.setup.worker
        path = config.run.metrics
        self.write_config()
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
        """The state of a phase without a checkpoint. Removes checkpoints of earlier runs."""
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
        state, stored = checkpoint.read(path)
        expected = self.checkpoints.fingerprints[phase]
        changes = fingerprint.differences(stored.adapters, expected.adapters)
        choice_changes = fingerprint.differences(stored.choice, expected.choice)
        if choice_changes and self._is_end_of_sft(state):
            # SFT's adapters are the same however they are judged: forget only the judgement.
            state = State(SFT, update=state.update, rows=state.rows, evaluated=True)
        else:
            changes += choice_changes
        if not changes:
            return path, state
        if not (self.setup.config.train.restart or self._is_finished(stored)):
            raise UserError(
                f"{path}: an unfinished run used other settings or pairs ({'; '.join(changes)}); "
                "set them back, set run_dir to another folder, or --set train.restart=true to "
                "start again"
            )
        print(f"10: not resuming from {path}, which used other inputs: {'; '.join(changes)}")
        return None

    def _is_end_of_sft(self, state: State) -> bool:
        at_end = state.phase == SFT and state.update == self.sft_updates
        return at_end and state.evaluated and not state.stopped

    def _is_finished(self, stored: CheckpointFingerprints) -> bool:
        """Whether a run with these fingerprints made the adapters in the run's folder."""
        inputs = fingerprint.read(self.setup.config.run.stamp(TRAINING)) or {}
        wanted = {**stored.adapters, **stored.choice}
        return all(inputs.get(name) == value for name, value in wanted.items())


def _fingerprints(setup: Setup, phase: str) -> CheckpointFingerprints:
    """What a phase's checkpoints depend on."""
    return CheckpointFingerprints(
        fingerprint.of(PHASE_ADAPTERS[phase], setup.config.flat, setup.fingerprint),
        fingerprint.of(BEST_CHECKPOINT, setup.config.flat),
    )


def _examples(pairs: list[EncodedPair], references: list[Sides[float]]) -> list[Example]:
    """The pairs with their reference. The reference may cover more pairs; it starts with these."""
    return [Example(*both) for both in zip(pairs, references[: len(pairs)], strict=True)]
