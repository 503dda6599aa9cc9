"""Scores answers under a model. The reference, training and evaluation all score here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..config import DpoConfig
from ..data.encoding import EncodedAnswer, EncodedPair
from ..model.adapters import adapters_off
from .log_probs import (
    Head,
    check_head,
    differentiable_divergences,
    differentiable_log_probs,
    find_head,
    token_log_probs,
)
from .losses import Arrays, Sides, objective, preference_loss, rewards

# How far one token's log-prob can move, in steps (eps) of the float type, when another kernel or
# machine computes it. Over an answer's tokens these differences add up like a random walk.
# Measured with SmolLM2 in bfloat16, fused against unfused attention, on 7 real answers: 3 to 12
# steps (0.3 to 0.9 nats per answer).
ROUNDING_STEPS = 32
MIN_DIFFERENCE = 1e-2  # nats; in float32 the difference is far smaller


@dataclass(frozen=True)
class PairScore:
    """What one pair contributes to the metrics, as float32 scalars.

    `pi` and `ref` are log p(answer | prompt) under the policy and the reference, in nats, `length`
    the answers' lengths in tokens. `loss` leaves out the term of `dpo.nll_weight`, so that every
    run with the same loss starts at the same value.
    """

    pi: Arrays
    ref: Arrays
    length: Arrays
    loss: float


class Scorer:
    """Computes log-probs of answers under a model, the model's divergence from the base model on
    them, and gradients in its trainable parameters.

    It runs one sequence at a time, without padding. Raises UserError for a model whose output layer
    it cannot reproduce. To find out, `check` runs the whole model on a few tokens.
    """

    def __init__(self, model: nn.Module, check: bool = True) -> None:
        self._backbone, self._head = find_head(model)
        if check:
            check_head(model, self._backbone, self._head)
        # No block gets a cache. The list has an entry for every block because a hybrid model looks
        # up its first attention block's entry, even when the memory plan runs fewer blocks.
        self._caches = [None] * len(model.layers)
        self.model = model

    def log_prob(self, sequence: EncodedAnswer) -> float:
        """log p(answer | prompt), summed over the answer's tokens, in nats.

        It rounds as training does.
        """
        scoring_mode(self.model)
        value = float(self._trace(sequence, token_log_probs)[0])
        mx.synchronize()  # raises here if a GPU command failed, before the value is used
        return value

    def nll_gradient(self, sequence: EncodedAnswer) -> tuple[float, Any]:
        """(an answer's negative log-likelihood in nats per token, its gradient (a tree))."""
        log_prob, gradient = self.log_prob_and_gradient(sequence)
        length = sequence.answer_length
        gradient = tree_map(lambda g: -g / length, gradient)
        mx.eval(gradient)
        return -float(log_prob) / length, gradient

    def divergence_gradient(self, sequence: EncodedAnswer) -> tuple[float, Any]:
        """(KL(base || policy) in nats, the mean over an answer's tokens, its gradient (a tree)).

        The base model is the model without its adapters. It runs in the same trace as the policy,
        so that both round alike and the divergence is 0 where training starts.
        """

        def divergence(hidden: mx.array, _: mx.array, head: Head) -> mx.array:
            with adapters_off(self.model):
                base = mx.stop_gradient(self._answer(sequence)[0])
            return differentiable_divergences(hidden, base, head) / sequence.answer_length

        result = self._trace(sequence, divergence)
        mx.eval(result)
        return float(result[0]), result[1]

    def pair_gradient(
        self, pair: EncodedPair, reference: Sides[float], settings: DpoConfig
    ) -> tuple[PairScore, Any]:
        """(a pair's score, the gradient of its objective in the trainable parameters (a tree)).

        The objective L depends on the model only through lc = log p(chosen) and lr = log
        p(rejected), so its gradient is dL/dlc grad(lc) + dL/dlr grad(lr). Each side runs alone and
        needs the memory of one answer.
        """
        pi, gradients = self.log_probs_and_gradients(pair)
        ref, length = Sides(*map(mx.array, reference)), lengths(pair)
        gradient = combine(objective_slopes(pi, ref, length, settings), gradients)
        score = PairScore(pi, ref, length, float(preference_loss(pi, ref, length, settings)))
        return score, gradient

    def log_probs_and_gradients(self, pair: EncodedPair) -> tuple[Arrays, Sides[Any]]:
        """(log p(answer | prompt) of both sides in nats, their gradients (trees))."""
        log_probs, gradients = zip(*map(self.log_prob_and_gradient, pair.sides), strict=True)
        return Sides(*log_probs), Sides(*gradients)

    def log_prob_and_gradient(self, sequence: EncodedAnswer) -> tuple[mx.array, Any]:
        """(log p(answer | prompt) in nats, its gradient in the trainable parameters (a tree)).

        Both are evaluated before this returns, so that no graph outlives its sequence.
        """
        result = self._trace(sequence, differentiable_log_probs)
        mx.eval(result)
        return result

    def _trace(
        self, sequence: EncodedAnswer, score: Callable[[mx.array, mx.array, Head], mx.array]
    ) -> tuple[mx.array, Any]:
        """(the sum of an answer's scores, its gradient), neither evaluated yet. `score` takes the
        hidden states, the tokens that they predict, and the head.

        Scoring without a gradient comes through here too, because MLX picks other kernels while it
        traces a gradient: no fused attention on Metal, no compiled activations on any device. In
        bfloat16 the two kinds of kernels round differently, by tenths of a nat per sequence.
        """

        def total() -> mx.array:
            hidden, targets = self._answer(sequence)
            return score(hidden, targets, self._head).sum()

        # A new function each time: a stored one would refer back to this scorer, and Python would
        # free the model only when its garbage collector runs.
        parameters = self.model.trainable_parameters()
        result = nn.value_and_grad(self.model, total)()
        self.model.update(parameters)  # tracing leaves traced arrays in the model
        return result

    def _answer(self, sequence: EncodedAnswer) -> tuple[mx.array, mx.array]:
        """(hidden states [T, D], answer tokens [T] they predict).

        Position t predicts token t + 1: the answer's tokens ids[prompt_length:] are scored by the
        hidden states prompt_length - 1 to L - 2.
        """
        ids = mx.array(sequence.ids)
        hidden = self._backbone(ids[None, :-1], self._caches)[0]
        start = sequence.prompt_length
        return hidden[start - 1 :], ids[start:]


def scoring_mode(model: nn.Module) -> None:
    """Puts a model in training mode, but without dropout: some models use other kernels then."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def rounding_limit(length: int, dtype: mx.Dtype) -> float:
    """The largest difference, in nats, that rounding explains between two log-probs of an answer of
    `length` tokens, computed by two machines or kernels under a model of `dtype`.
    """
    return max(MIN_DIFFERENCE, ROUNDING_STEPS * mx.finfo(dtype).eps * math.sqrt(length))


def objective_slopes(pi: Arrays, ref: Arrays, length: Arrays, settings: DpoConfig) -> Arrays:
    """d(objective)/d(log p) of each side."""

    def objective_of(chosen: mx.array, rejected: mx.array) -> mx.array:
        return objective(Sides(chosen, rejected), ref, length, settings)

    return Sides(*mx.grad(objective_of, argnums=(0, 1))(*pi))


def combine(slopes: Arrays, gradients: Sides[Any]) -> Any:
    """The sum of both sides' gradients (trees), each times its slope, evaluated."""
    combined = tree_map(lambda c, r: slopes.chosen * c + slopes.rejected * r, *gradients)
    mx.eval(combined)
    return combined


def lengths(pair: EncodedPair) -> Arrays:
    """The answers' lengths in tokens, as float32 scalars."""
    return Sides(*(mx.array(float(side.answer_length)) for side in pair.sides))


def score_against(
    pi: Sides[float], pair: EncodedPair, reference: Sides[float], settings: DpoConfig
) -> PairScore:
    """The score of a pair, from its log-probs under the policy and the reference, in nats."""
    policy, ref = Sides(*map(mx.array, pi)), Sides(*map(mx.array, reference))
    length = lengths(pair)
    return PairScore(policy, ref, length, float(preference_loss(policy, ref, length, settings)))


def summarise(scores: Iterable[PairScore], beta: float) -> dict[str, float]:
    """Means over pairs, under TRL's names. Accuracy is the share of pairs with a positive margin.

    A log-prob per token is the mean over pairs of each pair's own mean, in nats.
    """
    scores = list(scores)
    pi = _stack([score.pi for score in scores])
    ref = _stack([score.ref for score in scores])
    length = _stack([score.length for score in scores])
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


def _stack(sides: list[Arrays]) -> Arrays:
    """Scalars of many pairs as arrays [pairs]."""
    chosen, rejected = zip(*sides, strict=True)
    return Sides(mx.stack(list(chosen)), mx.stack(list(rejected)))
