"""The objectives: what SFT, DPO and replay minimise, and what they report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from ..config import Config
from ..data.encoding import EncodedPair
from .losses import Sides
from .scorer import PairScore, Scorer, score_against, summarise

SFT, DPO = "sft", "dpo"
PHASES = (SFT, DPO)  # in the order of a run
REPLAY = "replay"


@dataclass(frozen=True)
class Example:
    """A pair and its log-probs under the reference, in nats."""

    pair: EncodedPair
    reference: Sides[float]


class Sft:
    """Supervised fine-tuning on the chosen answers, with the learning rate and epochs of `sft`.

    A score is the chosen answer's negative log-likelihood, in nats per token.
    """

    name = SFT

    def __init__(self, config: Config) -> None:
        sft = config.sft
        self.settings = replace(config.train, epochs=sft.epochs, learning_rate=sft.learning_rate)

    def gradient(self, scorer: Scorer, example: Example) -> tuple[float, Any]:
        """(score, gradient in the trainable parameters) of an example."""
        return scorer.nll_gradient(example.pair.chosen)

    def values(self, score: float) -> list[float]:
        """The numbers from which `score` makes the same score in another process."""
        return [score]

    def score(self, example: Example, values: list[float]) -> float:
        return values[0]

    def loss(self, score: float) -> float:
        return score

    def summary(self, scores: list[float]) -> dict[str, float]:
        """The metrics of an update."""
        return {"nll_loss": float(np.mean(scores))}

    def tokens(self, example: Example) -> int:
        """The tokens that a gradient runs through."""
        return len(example.pair.chosen.ids)


class Replay(Sft):
    """The divergence from the base model on one of its own answers, the example's chosen one.

    A score is KL(base || policy), in nats per token. Of the settings only `grad_checkpoint` counts.
    """

    name = REPLAY

    def gradient(self, scorer: Scorer, example: Example) -> tuple[float, Any]:
        """(score, gradient in the trainable parameters) of an example."""
        return scorer.divergence_gradient(example.pair.chosen)

    def summary(self, scores: list[float]) -> dict[str, float]:
        """The metrics of an update."""
        return {"replay_divergence": float(np.mean(scores))}


class Dpo:
    """The preference loss on both answers. A score is a PairScore."""

    name = DPO

    def __init__(self, config: Config) -> None:
        self.settings = config.train
        self._dpo = config.dpo

    def gradient(self, scorer: Scorer, example: Example) -> tuple[PairScore, Any]:
        """(score, gradient in the trainable parameters) of an example."""
        return scorer.pair_gradient(example.pair, example.reference, self._dpo)

    def values(self, score: PairScore) -> list[float]:
        """The numbers from which `score` makes the same score in another process."""
        return [float(log_prob) for log_prob in score.pi]

    def score(self, example: Example, values: list[float]) -> PairScore:
        return score_against(Sides(*values), example.pair, example.reference, self._dpo)

    def loss(self, score: PairScore) -> float:
        return score.loss

    def summary(self, scores: list[PairScore]) -> dict[str, float]:
        """The metrics of an update."""
        return summarise(scores, self._dpo.beta)

    def tokens(self, example: Example) -> int:
        """The tokens that a gradient runs through."""
        return len(example.pair.chosen.ids) + len(example.pair.rejected.ids)


Objective: TypeAlias = Sft | Dpo

_BY_NAME = {objective.name: objective for objective in (Sft, Dpo, Replay)}


def by_name(name: str, config: Config) -> Objective:
    """SFT, DPO or REPLAY. A phase and its objective have the same name."""
    return _BY_NAME[name](config)
