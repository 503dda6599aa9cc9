"""The preflight: what a run will do, how long it takes, and what is wrong with its settings."""

from __future__ import annotations

import numpy as np

from ..config import Config
from ..files.errors import UserError
from ..files.run_folder import BASE, SPLITS, TRAIN, VALID
from ..model.gradient_checkpointing import gradient_checkpointing
from ..scoring import memory
from ..voice import cost
from . import findings
from .schedule import pairs_per_update
from .setup import Setup, load_reference


class Refused(UserError):
    """The preflight found settings that are sure to waste the run."""


def preflight(setup: Setup, only_read: bool = False) -> list[findings.Finding]:
    """Print what the run will do and what is wrong with it.

    This needs the pairs, the base model's log-probs of the valid ones, and the gradients of a few.
    Raises Refused for settings that are sure to waste the run, unless `train.force` is set, and
    UserError with `only_read` when those log-probs are not stored yet.
    """
    config, encoded = setup.config, setup.dpo_pairs
    base = load_reference(setup, BASE, VALID, only_read=only_read)
    with gradient_checkpointing(setup.model, config.train.grad_checkpoint):
        probe = findings.probe(setup.worker.scorer, config, encoded[TRAIN], encoded[VALID])
    facts = findings.gather(config, setup.raw, encoded, base, setup.classifier, probe)
    _describe(setup, facts, probe)
    all_findings = list(findings.of(facts, config))
    for finding in all_findings:
        print(f"10: {'sure to fail: ' if finding.fatal else 'note: '}{finding.text}")
    if any(finding.fatal for finding in all_findings) and not config.train.force:
        raise Refused(
            "the preflight found settings that are sure to waste the run, see above; change them, "
            "or --set train.force=true to train all the same"
        )
    return all_findings


def _describe(setup: Setup, facts: findings.Facts, probe: findings.Probe) -> None:
    """Print the data, the two phases, the time and the memory of a run."""
    for split in SPLITS:
        lengths = [pair.length for pair in setup.pairs[split]]
        print(
            f"10: {len(lengths)} {split} pairs; prompt plus the longer answer: median "
            f"{np.median(lengths):.0f} tokens, longest {max(lengths)}"
        )
    print(
        f"10: log-prob per token under the base model: chosen {facts.chosen_per_token:.2f}, "
        f"rejected {facts.rejected_per_token:.2f} nats; median lengths {facts.chosen_tokens:.0f} "
        f"and {facts.rejected_tokens:.0f} tokens"
    )
    print(f"10: a classifier is right on {facts.classifier_accuracy:.0%} of the held-out answers")
    _describe_phases(setup.config, facts)
    minutes = _seconds(setup, facts, probe) / 60
    print(
        f"10: about {minutes:.0f} minutes of training, plus sampling for the evaluations and replay"
    )
    print(f"10: {memory.describe(setup.need)}")


def _describe_phases(config: Config, facts: findings.Facts) -> None:
    size = pairs_per_update(config.train)
    if facts.sft_updates:
        print(
            f"10: SFT: {facts.sft_updates} updates, answers per update: {size}, learning rate "
            f"{config.sft.learning_rate:g}; estimated change of held-out answers: "
            f"{facts.sft_change:+.2g} nats per token"
        )
    print(
        f"10: DPO: {facts.dpo_updates} updates, pairs per update: {size}, learning rate "
        f"{config.train.learning_rate:g}, loss {config.dpo.loss}, beta {config.dpo.beta:g}; "
        "estimated change of held-out answers: chosen against rejected "
        f"{facts.dpo_change:+.2g} nats per token"
    )
    print(f"10: replay: {config.train.replay} answers of the base model per update")


def _seconds(setup: Setup, facts: findings.Facts, probe: findings.Probe) -> float:
    """The time of both phases and of the reference.

    Scoring a sequence, for the reference and for replay, takes a third of the time of a gradient.
    """
    config, train = setup.config, setup.dpo_pairs[TRAIN]
    chosen_tokens = sum(len(pair.chosen.ids) for pair in train)
    pair_tokens = chosen_tokens + sum(len(pair.rejected.ids) for pair in train)
    replayed = config.train.replay * (facts.sft_updates + facts.dpo_updates)
    tokens = config.sft.epochs * chosen_tokens + (config.train.epochs + 1 / 3) * pair_tokens
    return (tokens + (1 + 1 / 3) * replayed * cost.USUAL_TOKENS) * probe.seconds
