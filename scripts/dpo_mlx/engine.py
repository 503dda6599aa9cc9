"""The one place where a model scores an answer: for the reference, for training, for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .config import DpoConfig
from .logps import Head, check_head, differentiable_log_probs, find_head, token_log_probs
from .losses import Sides, objective, preference_loss, rewards
from .pairs import EncodedPair, Sequence
from .reference import Reference

# How far one token's log-prob can move, in steps (eps) of the float type, when another kernel or
# machine computes it. Over an answer's tokens these differences add up like a random walk.
# SmolLM2 in bfloat16, fused against unfused attention, 7 real answers: 3 to 12 (0.3 to 0.9 nats).
ROUNDINGS = 32
LEAST_DIFFERENCE = 1e-2  # nats; float32 stays far below


@dataclass(frozen=True)
class PairScore:
    """What one pair contributes to the metrics: log-probs in nats, lengths in tokens.

    `loss` is the preference loss alone, so that it starts at the same value whatever is added.
    """

    pi: Sides
    ref: Sides
    length: Sides
    loss: float


class Engine:
    """Log-probs of answers under a model, and the gradient of a pair in its trainable parameters.

    One sequence at a time, without padding. Raises UserError for a model whose output layer
    cannot be reproduced; to tell, `check` runs the whole model on a few tokens.
    """

    def __init__(self, model: nn.Module, check: bool = True) -> None:
        self._backbone, self._head = find_head(model)
        if check:
            check_head(model, self._backbone, self._head)
        # No cache for any block; a hybrid looks at its first attention block's by index, also
        # when the memory plan runs only the blocks before it.
        self._caches = [None] * len(model.layers)
        self.model = model

    def log_prob(self, sequence: Sequence) -> float:
        """log p(answer | prompt), the sum over the answer's tokens, in nats, rounded as in
        training.
        """
        scoring_mode(self.model)
        value = float(self._trace(sequence, token_log_probs)[0])
        mx.synchronize()  # raises here if a GPU command failed, before the value is used
        return value

    def nll_gradient(self, sequence: Sequence) -> tuple[float, Any]:
        """An answer's mean negative log-likelihood, in nats a token, and its gradient (a tree)."""
        log_prob, gradient = self.log_prob_and_gradient(sequence)
        length = sequence.answer_length
        gradient = tree_map(lambda g: -g / length, gradient)
        mx.eval(gradient)
        return -float(log_prob) / length, gradient

    def pair_gradient(
        self, pair: EncodedPair, reference: Reference, settings: DpoConfig
    ) -> tuple[PairScore, Any]:
        """A pair's score, and the gradient of its loss in the trainable parameters (a tree).

        The loss L knows the model through two scalars alone, so with lc = log p(chosen) and
        lr = log p(rejected) its gradient is dL/dlc grad(lc) + dL/dlr grad(lr): each side runs
        alone, and the memory needed is that of one.
        """
        pi, gradients = self.log_probs_and_gradients(pair)
        ref, length = _constants(pair, reference)
        gradient = combine(objective_slopes(pi, ref, length, settings), gradients)
        score = PairScore(pi, ref, length, float(preference_loss(pi, ref, length, settings)))
        return score, gradient

    def log_probs_and_gradients(self, pair: EncodedPair) -> tuple[Sides, Sides]:
        """(log p(answer | prompt) of both sides, their gradients in the trainable parameters)."""
        both = [self.log_prob_and_gradient(side) for side in pair.sides]
        return Sides(*(log_prob for log_prob, _ in both)), Sides(
            *(gradient for _, gradient in both)
        )

    def log_prob_and_gradient(self, sequence: Sequence) -> tuple[mx.array, Any]:
        """log p(answer | prompt) and its gradient in the trainable parameters (a tree).

        Both are computed now, so that no graph outlives its sequence.
        """
        result = self._trace(sequence, differentiable_log_probs)
        mx.eval(result)
        return result

    def _trace(
        self, sequence: Sequence, score: Callable[[mx.array, mx.array, Head], mx.array]
    ) -> tuple[mx.array, Any]:
        """(log p(answer | prompt), its gradient), both not evaluated yet.

        Scoring alone also traces the gradient, because MLX picks other kernels while it traces one:
        no fused attention on Metal, no compiled activations on any device. In bfloat16 the two
        kinds of kernels round differently, by tenths of a nat a sequence.
        """

        def log_prob() -> mx.array:
            hidden, targets = self._answer(sequence)
            return score(hidden, targets, self._head).sum()

        # Built anew each time. A stored function would refer back to this engine, and Python would
        # free the model only when its garbage collector runs.
        parameters = self.model.trainable_parameters()
        result = nn.value_and_grad(self.model, log_prob)()
        self.model.update(parameters)  # tracing leaves traced arrays in the model
        return result

    def _answer(self, sequence: Sequence) -> tuple[mx.array, mx.array]:
        """(hidden states [T, D], answer tokens [T] they predict).

        Position t predicts token t + 1: the answer's tokens ids[prompt_length:] are scored by the
        hidden states prompt_length - 1 to L - 2.
        """
        ids = mx.array(sequence.ids)
        hidden = self._backbone(ids[None, :-1], self._caches)[0]
        start = sequence.prompt_length
        return hidden[start - 1 :], ids[start:]


def scoring_mode(model: nn.Module) -> None:
    """Training mode without dropout, as some models use other kernels in training mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def rounding_limit(length: int, dtype: mx.Dtype) -> float:
    """The largest difference, in nats, that rounding explains between two machines' or kernels'
    log-probs of an answer of `length` tokens, under a model of `dtype`.
    """
    return max(LEAST_DIFFERENCE, ROUNDINGS * mx.finfo(dtype).eps * math.sqrt(length))


def objective_slopes(pi: Sides, ref: Sides, length: Sides, settings: DpoConfig) -> Sides:
    """d(objective)/d(log p) of each side."""

    def of(chosen: mx.array, rejected: mx.array) -> mx.array:
        return objective(Sides(chosen, rejected), ref, length, settings)

    return Sides(*mx.grad(of, argnums=(0, 1))(*pi))


def combine(slopes: Sides, gradients: Sides) -> Any:
    """The sum of both sides' gradients (trees), each times its slope; computed now."""
    combined = tree_map(lambda c, r: slopes.chosen * c + slopes.rejected * r, *gradients)
    mx.eval(combined)
    return combined


def lengths(pair: EncodedPair) -> Sides:
    """The answers' lengths in tokens, float32 scalars."""
    return Sides(*(mx.array(float(side.answer_length)) for side in pair.sides))


def _constants(pair: EncodedPair, reference: Reference) -> tuple[Sides, Sides]:
    """(reference log-probs, answer lengths) as float32 scalars."""
    return Sides(mx.array(reference.chosen), mx.array(reference.rejected)), lengths(pair)


def score_against(
    pi: tuple[float, float], pair: EncodedPair, reference: Reference, settings: DpoConfig
) -> PairScore:
    """The score of a pair from its log-probs (chosen, rejected) under the policy."""
    sides = Sides(mx.array(pi[0]), mx.array(pi[1]))
    ref, length = _constants(pair, reference)
    return PairScore(sides, ref, length, float(preference_loss(sides, ref, length, settings)))


def summarise(scores: Iterable[PairScore], beta: float) -> dict[str, float]:
    """Means over pairs, under TRL's names; accuracy counts the pairs with a positive margin.

    Log-probs per token are nats, the mean over pairs of each pair's own mean.
    """
    scores = list(scores)

    def stack(name: str) -> Sides:
        sides = [getattr(score, name) for score in scores]
        return Sides(mx.stack([s.chosen for s in sides]), mx.stack([s.rejected for s in sides]))

    pi, ref, length = stack("pi"), stack("ref"), stack("length")
    reward = rewards(pi, ref, beta)
    values = {
        "loss": mx.array([score.loss for score in scores]),
        "nll_loss": -pi.chosen / length.chosen,
        "rewards/chosen": reward.chosen,
        "rewards/rejected": reward.rejected,
        "rewards/margins": reward.chosen - reward.rejected,
        "rewards/accuracies": (reward.chosen > reward.rejected).astype(mx.float32),
        "logps/chosen": pi.chosen,
        "logps/rejected": pi.rejected,
        "logps/chosen_per_token": pi.chosen / length.chosen,
        "logps/rejected_per_token": pi.rejected / length.rejected,
        "logps/chosen_change_per_token": (pi.chosen - ref.chosen) / length.chosen,
    }
    return {name: float(value.mean()) for name, value in values.items()}
