"""What the data and the settings will do, said before the night is spent on them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from . import voice
from .config import Config
from .engine import Engine, combine, lengths, objective_slopes
from .losses import Sides
from .pairs import LENGTH, EncodedPair, Pair, Sequence
from .phase import Dpo, Sft, count_updates, learning_rate
from .reference import Reference
from .voice import VoiceClassifier

# Losses of log-probs averaged over tokens: their log-ratios are some hundred times smaller than
# those of summed ones, and beta must be as much larger.
AVERAGED = ("sigmoid_norm", "simpo")
LEAST_AVERAGED_BETA, MOST_SUMMED_BETA = 1.0, 1.0

# What a whole phase can change at first order, in nats a token: less than this nobody will read in
# the answers, and more than that is far outside of where the first order holds.
LEAST_CHANGE, MOST_CHANGE = 0.02, 20.0
AIM = 0.3

FAR, LENGTH_RATIO, MANY_CUT = 4.0, 2.0, 0.3
LEAST_PAIRS = 50
SCALES = (1.0, 64.0)
# Pairs whose gradients are looked at.
PROBED_TRAIN, PROBED_VALID = 8, 4


@dataclass(frozen=True)
class Finding:
    """A line with a number, what it means and what to set; a fatal one is sure to waste the run."""

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Probe:
    """First-order effects of one update with a rate of 1 on pairs it was not computed from.

    `sft` is the chosen answers' gain in nats a token by the SFT phase's update, `dpo` the gain of
    chosen over rejected, in nats a token, by the DPO phase's. `seconds` is what a token costs.
    """

    sft: float
    dpo: float
    seconds: float


@dataclass(frozen=True)
class Facts:
    """What the findings are judged by. Lengths are tokens, log-probs nats a token under the base
    model, changes nats a token at first order over a whole phase.
    """

    train_pairs: int
    chosen_per_token: float
    rejected_per_token: float
    chosen_tokens: float
    rejected_tokens: float
    cut_share: float
    classifier_accuracy: float
    sft_updates: int
    dpo_updates: int
    sft_change: float
    dpo_change: float


def gather(
    config: Config,
    raw: dict[str, list[Pair]],
    encoded: dict[str, list[EncodedPair]],
    base: list[Reference],
    classifier: VoiceClassifier,
    probed: Probe,
) -> Facts:
    """The facts of pairs by split, of the base model's log-probs of the valid pairs, of a probe."""
    valid, train = encoded["valid"], encoded["train"]
    sft, dpo = Sft(config).settings, Dpo(config).settings
    sft_updates, dpo_updates = (count_updates(s, len(train)) for s in (sft, dpo))
    cut = {pair.line for pair in raw["train"] if pair.rejected_finish == LENGTH}
    return Facts(
        train_pairs=len(train),
        chosen_per_token=_mean(r.chosen / p.chosen.answer_length for r, p in _zip(base, valid)),
        rejected_per_token=_mean(
            r.rejected / p.rejected.answer_length for r, p in _zip(base, valid)
        ),
        chosen_tokens=float(np.median([p.chosen.answer_length for p in train])),
        rejected_tokens=float(np.median([p.rejected.answer_length for p in train])),
        cut_share=_mean(
            p.line in cut and p.rejected.answer_length < p.chosen.answer_length for p in train
        ),
        classifier_accuracy=classifier.accuracy(
            [p.chosen for p in raw["valid"]], [p.rejected for p in raw["valid"]]
        ),
        sft_updates=sft_updates,
        dpo_updates=dpo_updates,
        sft_change=probed.sft * _travel(sft, sft_updates),
        dpo_change=probed.dpo * _travel(dpo, dpo_updates),
    )


def probe(
    engine: Engine, config: Config, train: list[EncodedPair], valid: list[EncodedPair]
) -> Probe:
    """What an update learned from a few train pairs does to a few valid ones.

    Adam's first update is the rate times the sign of the gradient, so that its first-order effect
    on a log-prob is the rate times the sum of (sign of the update) x (gradient of the log-prob).
    The policy is the reference here, whatever the loss.
    """
    started, tokens = time.perf_counter(), 0
    sft = dpo = None
    for pair in train[:PROBED_TRAIN]:
        pi, gradients = engine.log_probs_and_gradients(pair)
        length = lengths(pair)
        sft = _add(sft, combine(Sides(-1 / length.chosen, mx.array(0.0)), gradients))
        dpo = _add(dpo, combine(objective_slopes(pi, pi, length, config.dpo), gradients))
        mx.eval(sft, dpo)
        tokens += sum(len(side.ids) for side in pair.sides)
    by_sft, by_dpo = tree_map(mx.sign, sft), tree_map(mx.sign, dpo)
    gains_sft, gains_dpo = [], []
    for pair in valid[:PROBED_VALID]:
        _, gradients = engine.log_probs_and_gradients(pair)
        gains_sft.append(_gain(by_sft, gradients.chosen, pair.chosen))
        gains_dpo.append(
            _gain(by_dpo, gradients.chosen, pair.chosen)
            - _gain(by_dpo, gradients.rejected, pair.rejected)
        )
        tokens += sum(len(side.ids) for side in pair.sides)
    seconds = (time.perf_counter() - started) / tokens
    return Probe(_mean(gains_sft), _mean(gains_dpo), seconds)


def _add(total: Any, gradient: Any) -> Any:
    return gradient if total is None else tree_map(mx.add, total, gradient)


def _gain(signs: Any, gradient: Any, side: Sequence) -> float:
    """What a step of 1 against these signs of a loss's gradient adds to a side's log-prob, in nats
    a token.
    """
    both = dict(tree_flatten(tree_map(lambda s, g: (s * g).sum(), signs, gradient)))
    return -sum(float(value) for value in both.values()) / side.answer_length


def findings(facts: Facts, config: Config) -> Iterator[Finding]:
    """What is to be said of these facts under these settings; nothing for a sound run."""
    yield from _of_data(facts, config)
    yield from _of_beta(config)
    yield from _of_rates(facts, config)
    yield from _of_lora(config)


def _of_data(facts: Facts, config: Config) -> Iterator[Finding]:
    if facts.train_pairs < LEAST_PAIRS:
        yield Finding(
            f"{facts.train_pairs} train pairs: a voice is learned from {LEAST_PAIRS} or more; add "
            "rows or raise data.limit"
        )
    gap = facts.rejected_per_token - facts.chosen_per_token
    if gap > FAR and not config.sft.epochs:
        yield Finding(
            f"chosen answers lie {gap:.1f} nats a token further from the base model than its own "
            f"({facts.chosen_per_token:.2f} against {facts.rejected_per_token:.2f}): DPO alone "
            "unlearns both sides before it reaches them; set sft.epochs: 2"
        )
    ratio = facts.rejected_tokens / max(facts.chosen_tokens, 1.0)
    if not 1 / LENGTH_RATIO <= ratio <= LENGTH_RATIO:
        cut = "dpo.match_length: true, or " if ratio > 1 else ""
        yield Finding(
            f"rejected answers are {ratio:.1f} times as long as chosen ones (median "
            f"{facts.rejected_tokens:.0f} against {facts.chosen_tokens:.0f} tokens): length is the "
            f"easiest difference to learn; set {cut}dpo.loss: sigmoid_norm with dpo.beta: 5"
        )
    if facts.cut_share > MANY_CUT:
        yield Finding(
            f"{facts.cut_share:.0%} of the rejected answers were cut before they were as long as "
            "the chosen ones, and length tells them apart; fewer are with a higher "
            "generation.max_tokens"
        )
    if facts.classifier_accuracy < voice.LEAST_ACCURACY:
        yield Finding(
            f"the classifier is right on {facts.classifier_accuracy:.0%} of held-out answers, "
            f"under {voice.LEAST_ACCURACY:.0%}: the voice cannot be measured on these pairs; judge "
            "the answers in the report yourself"
        )


def _of_beta(config: Config) -> Iterator[Finding]:
    beta, loss = config.dpo.beta, config.dpo.loss
    if loss in AVERAGED and beta < LEAST_AVERAGED_BETA:
        yield Finding(
            f"dpo.beta {beta:g} with {loss}: its log-probs are averaged over tokens, and so weak a "
            "hold lets the model drift to nonsense; set dpo.beta: 5, or dpo.loss: sigmoid",
            fatal=True,
        )
    if loss not in AVERAGED and beta > MOST_SUMMED_BETA:
        yield Finding(
            f"dpo.beta {beta:g} with {loss}: its log-probs are summed over tokens, and so strong a "
            "hold ends learning within a nat; set dpo.beta: 0.1",
            fatal=True,
        )


def _of_rates(facts: Facts, config: Config) -> Iterator[Finding]:
    """Both phases: DPO is judged with what SFT does before it."""
    if config.sft.epochs:
        yield from _of_rate("sft", facts.sft_updates, config.sft.learning_rate, facts.sft_change)
    rate, change = config.train.learning_rate, facts.dpo_change
    yield from _of_rate("train", facts.dpo_updates, rate, change, alone=not config.sft.epochs)


def _of_rate(
    section: str, updates: int, rate: float, change: float, alone: bool = True
) -> Iterator[Finding]:
    key = f"{section}.learning_rate"
    if not change > 0:
        yield Finding(
            f"{key} {rate:g}: the first update would not move unseen pairs the right way "
            f"({change:+.3g} nats a token over {updates} updates); are chosen and rejected "
            "swapped?",
            fatal=alone,
        )
        return
    aim = rate * AIM / change
    if change < LEAST_CHANGE:
        yield Finding(
            f"{key} {rate:g}: {updates} updates can change unseen answers by about {change:.2g} "
            f"nats a token, which moves nothing; set {key}: {aim:.1g}, or more epochs",
            fatal=alone,
        )
    if change > MOST_CHANGE:
        yield Finding(
            f"{key} {rate:g}: {updates} updates could change unseen answers by {change:.0f} nats a "
            f"token, far more than any voice needs; set {key}: {aim:.1g}",
            fatal=True,
        )


def _of_lora(config: Config) -> Iterator[Finding]:
    low, high = SCALES
    if not low <= config.lora.scale <= high:
        yield Finding(
            f"lora.scale {config.lora.scale:g} with rank {config.lora.rank}: outside {low:g} to "
            f"{high:g} the learning rate means something else than the figures given for it (alpha "
            f"is {config.lora.scale * config.lora.rank:g}); set lora.scale: 20"
        )


def _travel(settings: Any, updates: int) -> float:
    """The sum of the rates of all updates: as far as Adam can move one weight."""
    if not updates:
        return 0.0
    schedule = learning_rate(settings, updates)
    return float(sum(float(schedule(mx.array(step))) for step in range(updates)))


def _zip(base: list[Reference], valid: list[EncodedPair]) -> Iterable[Any]:
    return zip(base, valid, strict=True)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
