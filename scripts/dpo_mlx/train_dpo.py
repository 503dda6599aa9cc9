"""Stage 10: pairs in, adapters out; the reference first, then training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from . import config as configs
from . import diagnose, jsonl, memory, metrics, models, stamp
from .config import Config
from .errors import UserError
from .guard import Guard
from .job import AFTER_SFT, BASE, SPLITS, TRAIN, VALID, Job, load_reference, pair_file, prepare
from .reference import Reference
from .trainer import Dpo, Example, Sft, Stopped, Trainer, count_updates, pairs_per_update
from .writing import Measures, Watch

STAGES = PRECOMPUTE, TRAIN_ONLY, ALL = ("precompute", "train", "all")


@dataclass(frozen=True)
class Outcome:
    """How training ended; `stopped` says why when it did not reach its end. `voice` is the score
    of the kept adapters' answers.
    """

    updates: int
    kept_update: int
    voice: float
    stopped: list[str]


def train_dpo(config: Config, stage: str) -> bool:
    """Run stage 10, one of STAGES; whether training reached its end.

    Raises UserError for pairs, a model or settings that cannot be trained, and for TRAIN_ONLY
    without a reference.
    """
    stamp_path, adapters = stamp.path(config.run, "10_train_dpo"), config.run / "adapters"
    outcome_path = config.run / "outcome.json"
    inputs = training_inputs(config)
    if stage != PRECOMPUTE and stamp.is_current(stamp_path, inputs, [adapters, outcome_path]):
        print(f"10: {adapters} is up to date, skipped")
        return _say(Outcome(**jsonl.read_json(outcome_path)), adapters)
    job = prepare(config)
    preflight(job, only_read=stage == TRAIN_ONLY)
    outcome = _run(job, stage)
    if outcome is None:
        return True
    models.copy_folder(config.run / "checkpoints/best", adapters)
    jsonl.write_json(outcome_path, asdict(outcome))
    stamp.write(stamp_path, training_inputs(config))
    return _say(outcome, adapters)


def _say(outcome: Outcome, adapters: Path) -> bool:
    for reason in outcome.stopped:
        print(f"10: stopped after update {outcome.updates}: {reason}")
    if outcome.stopped:
        print(
            "10: this is a finding: lower train.learning_rate (and sft.learning_rate), or raise "
            "dpo.beta or dpo.nll_weight"
        )
    print(
        f"10: {outcome.updates} updates; {adapters} holds those of update {outcome.kept_update}, "
        f"whose answers are most in the voice (score {outcome.voice:.2f}) and within guard's limits"
    )
    return not outcome.stopped


def preflight(job: Job, only_read: bool = False) -> list[diagnose.Finding]:
    """Say what the run will do and what is wrong with it, from the pairs, the base model's
    log-probs of the valid ones, and the gradients of a few.

    Raises UserError for what is sure to waste the run, unless `train.force`; with `only_read` also
    when those log-probs are not there yet.
    """
    config, valid = job.config, job.pairs[VALID]
    base = load_reference(job, BASE, VALID, only_read=only_read)
    with models.gradient_checkpointing(job.model, config.train.grad_checkpoint):
        probed = diagnose.probe(job.engine, config, job.pairs[TRAIN], valid)
    facts = diagnose.gather(config, job.raw, job.pairs, base, job.classifier, probed)
    _describe(job, facts, probed)
    found = list(diagnose.findings(facts, config))
    for finding in found:
        print(f"10: {'sure to fail: ' if finding.fatal else 'note: '}{finding.text}")
    if any(finding.fatal for finding in found) and not config.train.force:
        raise UserError(
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
        f"10: about {_seconds(job, probed) / 60:.0f} minutes and the answers of each evaluation; "
        f"memory at the peak {job.plan}, of {memory.available() / 1e9:.2f} GB"
    )


def _seconds(job: Job, probed: diagnose.Probe) -> float:
    """Of both phases and the reference, whose forward pass is a third of a gradient's cost."""
    config, train = job.config, job.pairs[TRAIN]
    chosen = sum(len(pair.chosen.ids) for pair in train)
    both = chosen + sum(len(pair.rejected.ids) for pair in train)
    passes = config.sft.epochs * chosen + (config.train.epochs + 1 / 3) * both
    return passes * probed.seconds


def training_inputs(config: Config) -> stamp.Inputs:
    """Everything that determines the adapters."""
    made = _shared_inputs(config)
    for section in ("dpo", "train", "guard", "generation"):
        made |= _section(config, section)
    for key in ("train.force", "generation.restart", "generation.batch_size"):
        del made[key]
    return made


def _sft_inputs(config: Config) -> stamp.Inputs:
    """Everything that determines the adapters after SFT."""
    made = _shared_inputs(config) | _section(config, "train")
    others = "learning_rate", "epochs", "eval_every", "eval_questions", "force"
    return {k: v for k, v in made.items() if k not in {f"train.{key}" for key in others}}


def _shared_inputs(config: Config) -> stamp.Inputs:
    files = [pair_file(config, split) for split in SPLITS]
    return {
        "pairs": [jsonl.digest(path) if path.is_file() else None for path in files],
        "model files": models.fingerprint(config.model),
        "system_prompt": config.system_prompt,
        "data.max_length": config.data.max_length,
        "seed": config.seed,
        **_section(config, "lora"),
        **_section(config, "sft"),
    }


def _section(config: Config, name: str) -> stamp.Inputs:
    return {f"{name}.{key}": value for key, value in asdict(getattr(config, name)).items()}


def _run(job: Job, stage: str) -> Outcome | None:
    """Train what `stage` asks for; None when that was no more than the reference."""
    phases = Phases(job)
    try:
        if job.config.sft.epochs:
            phases.warm_up(only_read=stage == TRAIN_ONLY)
        references = phases.references(only_read=stage == TRAIN_ONLY)
        if stage == PRECOMPUTE:
            _keep_settings(job.config)
            return None
        phases.align(references)
        updates, stopped = phases.updates, []
    except Stopped as stop:
        updates, stopped = stop.update, stop.reasons
    best = phases.guard.kept
    return Outcome(updates, best.update, best.voice, stopped)


def _keep_settings(config: Config) -> None:
    """The resolved settings, beside what they make."""
    jsonl.write_text(config.run / "config.yaml", configs.dump(config))


class Phases:
    """SFT and DPO over one job, judged by the answers to the same questions."""

    def __init__(self, job: Job) -> None:
        self.job = job
        asked = job.raw[VALID][: job.config.train.eval_questions]
        self.watch = Watch(job.model, job.encoder, job.classifier, asked, job.config)
        self.sft, self.dpo = Sft(job.config), Dpo(job.config)
        self.first = count_updates(self.sft.settings, len(job.pairs[TRAIN]))
        self.updates = self.first + count_updates(self.dpo.settings, len(job.pairs[TRAIN]))
        self._warm = job.config.run / "checkpoints/sft"
        self._written: Measures | None = None  # by the model as it is, when that is known

    @cached_property
    def guard(self) -> Guard:
        return Guard(self.base, self.job.config.guard)

    @cached_property
    def base(self) -> Measures:
        """What the base model writes."""
        print("10: the base model answers the questions of the evaluations")
        return self.watch.base()

    def warm_up(self, only_read: bool) -> None:
        """SFT, unless its adapters are there already. Raises UserError when they are not and
        `only_read`.
        """
        job, config = self.job, self.job.config
        stamp_path, inputs = stamp.path(config.run, "10_sft"), _sft_inputs(config)
        if stamp.is_current(stamp_path, inputs, [self._warm]):
            models.load_adapters(job.model, self._warm)
            return
        if only_read:
            raise UserError(
                f"{self._warm}: no adapters of SFT with these settings; run 10_train_dpo.py "
                "--stage precompute first"
            )
        unread = Reference(math.nan, math.nan)  # SFT looks at no reference of a train pair
        examples = {
            TRAIN: [Example(pair, unread) for pair in job.pairs[TRAIN]],
            VALID: _examples(job, VALID, load_reference(job, BASE, VALID)),
        }
        self._written = self._train(self.sft, examples, 0, self.base)
        models.save_adapters(job.model, config.lora, self._warm)
        stamp.write(stamp_path, inputs)

    def references(self, only_read: bool) -> dict[str, list[Reference]]:
        """The reference of both splits: of the base model, or as SFT has left it."""
        taken_of, adapters = (AFTER_SFT, self._warm) if self.first else (BASE, None)
        return {s: load_reference(self.job, taken_of, s, adapters, only_read) for s in SPLITS}

    def align(self, references: dict[str, list[Reference]]) -> None:
        """DPO."""
        examples = {split: _examples(self.job, split, references[split]) for split in SPLITS}
        written = self._written if self.first else self.base
        self._train(self.dpo, examples, self.first, written)

    def _train(
        self,
        phase: Sft | Dpo,
        examples: dict[str, list[Example]],
        first: int,
        written: Measures | None,
    ) -> Measures:
        config = self.job.config
        _keep_settings(config)
        earlier = (self.sft.name,) if first else ()
        reporters = metrics.reporters(config, asdict(config))
        metrics_file = metrics.MetricsFile(config.run / "metrics.jsonl", earlier)
        bar = metrics.ProgressBar(first, self.updates)
        trainer = Trainer(
            self.job.model,
            config,
            phase,
            examples[TRAIN],
            examples[VALID],
            metrics.Callbacks(metrics_file, bar, *reporters),
            self.watch,
            self.guard,
            first,
        )
        try:
            return trainer.run(written)
        finally:
            bar.close()


def _examples(job: Job, split: str, references: list[Reference]) -> list[Example]:
    """Of a split's pairs; of the valid ones those that evaluations look at, the first ones."""
    encoded = job.pairs[TRAIN] if split == TRAIN else job.watched
    return [Example(*both) for both in zip(encoded, references[: len(encoded)], strict=True)]
