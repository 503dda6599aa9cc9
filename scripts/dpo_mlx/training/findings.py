"""The findings of the preflight: problems with the data and the settings."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..config import Config, TrainConfig
from ..data.encoding import EncodedAnswer, EncodedPair
from ..data.pairs import LENGTH, Pair
from ..scoring.losses import Sides
from ..scoring.objectives import Dpo, Sft
from ..scoring.scorer import Scorer, combine, lengths, objective_slopes
from ..voice.voice_classifier import MIN_ACCURACY, VoiceClassifier
from .schedule import count_updates, learning_rate

# These losses average log-probs over tokens. That makes their log-ratios about a hundred times
# smaller than those of summed log-probs, so beta must be about a hundred times larger.
AVERAGED = ("sigmoid_norm", "simpo")
MIN_AVERAGED_BETA, MAX_SUMMED_BETA = 1.0, 1.0

# Limits on how far a phase moves held-out answers at first order, in nats per token. Nobody can see
# a change by less than MIN_CHANGE over the whole phase. MAX_DPO_CHANGE is for all of DPO, whose
# loss has no end. The loss of SFT has one, and more data may take more updates, so MAX_SFT_UPDATE
# is for one update at the peak rate: SmolLM2 learned well at 0.3 and 0.6, and broke at 15. The
# rates that we suggest move the answers by AIM.
MIN_CHANGE, MAX_DPO_CHANGE, MAX_SFT_UPDATE = 0.02, 20.0, 3.0
AIM = 0.3

# Nats per token between the sides; how many times as long one side may be; share of cut answers.
FAR, LENGTH_RATIO, MANY_CUT = 4.0, 2.0, 0.3
MIN_PAIRS = 50
SCALES = (1.0, 64.0)
# The probe takes the gradients of this many pairs.
PROBED_TRAIN, PROBED_VALID = 8, 4


@dataclass(frozen=True)
class Finding:
    """A value, what it means and what to set. A fatal finding is sure to waste the run."""

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Probe:
    """First-order effects of one update with a learning rate of 1 on pairs it has not seen.

    `sft` is the chosen answers' gain after an update of SFT, `dpo` the gain of chosen answers over
    rejected ones after an update of DPO, both in nats per token. `seconds` is the time per
    token.
    """

    sft: float
    dpo: float
    seconds: float


@dataclass(frozen=True)
class Facts:
    """What the findings depend on.

    Lengths are medians in tokens. Log-probs are the base model's, in nats per token. Changes are
    at first order, in nats per token: `sft_change` and `dpo_change` over the whole phase,
    `sft_update_change` of one update of SFT at its peak rate.
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
    sft_update_change: float
    dpo_change: float


def gather(
    config: Config,
    raw: dict[str, list[Pair]],
    encoded: dict[str, list[EncodedPair]],
    base: list[Sides[float]],
    classifier: VoiceClassifier,
    probe: Probe,
) -> Facts:
    """The facts of a run. `raw` and `encoded` are its pairs by split, `base` the log-probs of the
    valid pairs under the base model, in nats.
    """
    valid, train = encoded["valid"], encoded["train"]
    sft, dpo = Sft(config).settings, Dpo(config).settings
    sft_updates, dpo_updates = (count_updates(s, len(train)) for s in (sft, dpo))
    chosen, rejected = _log_probs_per_token(base, valid)
    return Facts(
        train_pairs=len(train),
        chosen_per_token=chosen,
        rejected_per_token=rejected,
        chosen_tokens=float(np.median([p.chosen.answer_length for p in train])),
        rejected_tokens=float(np.median([p.rejected.answer_length for p in train])),
        cut_share=_cut_share(raw["train"], train),
        classifier_accuracy=classifier.accuracy(
            [p.chosen for p in raw["valid"]], [p.rejected for p in raw["valid"]]
        ),
        sft_updates=sft_updates,
        dpo_updates=dpo_updates,
        sft_change=probe.sft * _sum_of_rates(sft, sft_updates),
        sft_update_change=probe.sft * sft.learning_rate,
        dpo_change=probe.dpo * _sum_of_rates(dpo, dpo_updates),
    )


def _log_probs_per_token(log_probs: list[Sides[float]], pairs: list[EncodedPair]) -> Sides[float]:
    """The mean over pairs of each answer's own mean, in nats per token."""
    both = list(zip(log_probs, pairs, strict=True))
    return Sides(
        _mean(log_prob.chosen / pair.chosen.answer_length for log_prob, pair in both),
        _mean(log_prob.rejected / pair.rejected.answer_length for log_prob, pair in both),
    )


def _cut_share(raw: list[Pair], encoded: list[EncodedPair]) -> float:
    """The share of pairs whose rejected answer was cut before it was as long as the chosen one."""
    cut_lines = {pair.line for pair in raw if pair.rejected_finish == LENGTH}
    return _mean(
        p.line in cut_lines and p.rejected.answer_length < p.chosen.answer_length for p in encoded
    )


def probe(
    scorer: Scorer, config: Config, train: list[EncodedPair], valid: list[EncodedPair]
) -> Probe:
    """Measure what an update learned from a few train pairs does to a few valid ones.

    Adam's first update is the rate times the sign of the gradient. So its first-order effect on a
    log-prob is the rate times the sum of (sign of the update) x (gradient of the log-prob). The
    policy is the reference here, for every loss.
    """
    train, valid = train[:PROBED_TRAIN], valid[:PROBED_VALID]
    started = time.perf_counter()
    sft_signs, dpo_signs = _update_signs(scorer, config, train)
    sft_gains, dpo_gains = [], []
    for pair in valid:
        _, gradients = scorer.log_probs_and_gradients(pair)
        sft_gains.append(_gain(sft_signs, gradients.chosen, pair.chosen))
        dpo_gains.append(
            _gain(dpo_signs, gradients.chosen, pair.chosen)
            - _gain(dpo_signs, gradients.rejected, pair.rejected)
        )
    tokens = sum(len(side.ids) for pair in (*train, *valid) for side in pair.sides)
    seconds = (time.perf_counter() - started) / tokens
    return Probe(_mean(sft_gains), _mean(dpo_gains), seconds)


def _update_signs(scorer: Scorer, config: Config, pairs: list[EncodedPair]) -> tuple[Any, Any]:
    """The signs of the gradients (trees) of SFT and of DPO, summed over pairs."""
    sft = dpo = None
    for pair in pairs:
        pi, gradients = scorer.log_probs_and_gradients(pair)
        length = lengths(pair)
        sft = _add(sft, combine(Sides(-1 / length.chosen, mx.array(0.0)), gradients))
        dpo = _add(dpo, combine(objective_slopes(pi, pi, length, config.dpo), gradients))
        mx.eval(sft, dpo)
    return tree_map(mx.sign, sft), tree_map(mx.sign, dpo)


def _add(total: Any, gradient: Any) -> Any:
    return gradient if total is None else tree_map(mx.add, total, gradient)


def _gain(signs: Any, gradient: Any, side: EncodedAnswer) -> float:
    """How much more likely an answer becomes by a step of 1 against these signs of a loss's
    gradient, in nats per token.
    """
    products = dict(tree_flatten(tree_map(lambda s, g: (s * g).sum(), signs, gradient)))
    return -sum(float(value) for value in products.values()) / side.answer_length


def of(facts: Facts, config: Config) -> Iterator[Finding]:
    """What is wrong with these facts and settings. Nothing for a sound run."""
    yield from _data_findings(facts, config)
    yield from _length_findings(facts)
    yield from _classifier_findings(facts)
    yield from _beta_findings(config)
    yield from _rate_findings(facts, config)
    yield from _lora_findings(config)


def _data_findings(facts: Facts, config: Config) -> Iterator[Finding]:
    if facts.train_pairs < MIN_PAIRS:
        yield Finding(
            f"{facts.train_pairs} train pairs: learning a voice takes {MIN_PAIRS} or more; add "
            "rows or raise data.limit"
        )
    gap = facts.rejected_per_token - facts.chosen_per_token
    if gap > FAR and not config.sft.epochs:
        yield Finding(
            f"your answers are {gap:.1f} nats per token less likely under the base model than its "
            f"own ({facts.chosen_per_token:.2f} against {facts.rejected_per_token:.2f}). DPO alone "
            "would make both kinds unlikely before it learned yours; set sft.epochs: 3"
        )


def _length_findings(facts: Facts) -> Iterator[Finding]:
    ratio = facts.rejected_tokens / max(facts.chosen_tokens, 1.0)
    if not 1 / LENGTH_RATIO <= ratio <= LENGTH_RATIO:
        cut = "dpo.match_length: true, or " if ratio > 1 else ""
        yield Finding(
            f"rejected answers are {ratio:.1f} times as long as yours (median "
            f"{facts.rejected_tokens:.0f} against {facts.chosen_tokens:.0f} tokens): length is the "
            f"easiest difference to learn; set {cut}dpo.loss: sigmoid_norm with dpo.beta: 5"
        )
    if facts.cut_share > MANY_CUT:
        yield Finding(
            f"{facts.cut_share:.0%} of the rejected answers were cut before they were as long as "
            "yours, so DPO can tell them apart by their length; raise generation.max_tokens to cut "
            "fewer of them"
        )


def _classifier_findings(facts: Facts) -> Iterator[Finding]:
    if facts.classifier_accuracy < MIN_ACCURACY:
        yield Finding(
            "a classifier that tells your answers from the base model's is right on only "
            f"{facts.classifier_accuracy:.0%} of the held-out ones: there is little voice to "
            "learn, or too little to measure; judge the answers in the report yourself"
        )


def _beta_findings(config: Config) -> Iterator[Finding]:
    beta, loss = config.dpo.beta, config.dpo.loss
    if loss in AVERAGED and beta < MIN_AVERAGED_BETA:
        yield Finding(
            f"dpo.beta {beta:g} with {loss}: this loss averages log-probs over tokens; with a "
            "beta this low, the model drifts into nonsense; set dpo.beta: 5, or dpo.loss: sigmoid",
            fatal=True,
        )
    if loss not in AVERAGED and beta > MAX_SUMMED_BETA:
        yield Finding(
            f"dpo.beta {beta:g} with {loss}: this loss sums log-probs over tokens; with a beta "
            "this high, learning stops after a change of about one nat; set dpo.beta: 0.1",
            fatal=True,
        )


def _rate_findings(facts: Facts, config: Config) -> Iterator[Finding]:
    sft, dpo = config.sft, config.train
    if sft.epochs:
        yield from _phase_findings("sft", facts.sft_updates, sft.learning_rate, facts.sft_change)
        if facts.sft_update_change > MAX_SFT_UPDATE:
            yield _too_fast("sft", "one update", sft.learning_rate, facts.sft_update_change)
    yield from _phase_findings(
        "train", facts.dpo_updates, dpo.learning_rate, facts.dpo_change, alone=not sft.epochs
    )
    if facts.dpo_change > MAX_DPO_CHANGE:
        updates = f"{facts.dpo_updates} updates"
        yield _too_fast("train", updates, dpo.learning_rate, facts.dpo_change)


def _phase_findings(
    section: str, updates: int, rate: float, change: float, alone: bool = True
) -> Iterator[Finding]:
    """On the learning rate of a phase. A weak DPO is fatal only if it is `alone`, without SFT."""
    key = f"{section}.learning_rate"
    if not change > 0:
        yield Finding(
            f"{key} {rate:g}: the first update would not move held-out pairs the right way "
            f"({change:+.3g} nats per token over {updates} updates); are chosen and rejected "
            "swapped?",
            fatal=alone,
        )
        return
    aim = rate * AIM / change
    if change < MIN_CHANGE:
        yield Finding(
            f"{key} {rate:g}: {updates} updates can change held-out answers by about "
            f"{change:.2g} nats per token, too little to change any answer; set {key}: {aim:.1g}, "
            "or more epochs",
            fatal=alone,
        )


def _too_fast(section: str, updates: str, rate: float, change: float) -> Finding:
    key = f"{section}.learning_rate"
    return Finding(
        f"{key} {rate:g}: {updates} could change held-out answers by {change:.0f} nats per token, "
        f"far more than any voice needs; set {key}: {rate * AIM / change:.1g}",
        fatal=True,
    )


def _lora_findings(config: Config) -> Iterator[Finding]:
    low, high = SCALES
    if not low <= config.lora.scale <= high:
        yield Finding(
            f"lora.scale {config.lora.scale:g} with rank {config.lora.rank} (alpha "
            f"{config.lora.scale * config.lora.rank:g}): the learning rates that we recommend hold "
            f"for a scale of {low:g} to {high:g}; set lora.scale: 20"
        )


def _sum_of_rates(settings: TrainConfig, updates: int) -> float:
    """The sum of the learning rates of all updates: as far as Adam can move one weight."""
    if not updates:
        return 0.0
    schedule = learning_rate(settings, updates)
    return float(sum(float(schedule(mx.array(step))) for step in range(updates)))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
