"""Preference losses: pure functions of four log-probs that return one value per pair.

pi_chosen, pi_rejected, ref_chosen and ref_rejected are log p(answer | prompt), summed over the
answer's tokens, in nats, under the policy and the frozen reference. n_chosen and n_rejected are the
answers' lengths in tokens. All are float32 arrays of one shape, with one value per pair. Every
loss returns an array of that shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from ..config import DpoConfig as Settings


Side = TypeVar("Side")


class Sides(NamedTuple, Generic[Side]):
    """The same thing for both answers of a pair: log-probs, lengths, gradients."""

    chosen: Side
    rejected: Side


Arrays: TypeAlias = Sides[mx.array]
Loss = Callable[[Arrays, Arrays, Arrays, "Settings"], mx.array]


def sigmoid(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): -log sigma(beta h).

    h = (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected). With label smoothing e, cDPO
    (Mitchell 2023): -(1 - e) log sigma(beta h) - e log sigma(-beta h).
    """
    logits = s.beta * _log_ratio_difference(pi, ref)
    e = s.label_smoothing
    return -(1 - e) * nn.log_sigmoid(logits) - e * nn.log_sigmoid(-logits)


def robust(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12).

    (-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2e). It is unbiased when a share
    e < 1/2 of the labels is flipped.
    """
    logits = s.beta * _log_ratio_difference(pi, ref)
    e = s.label_smoothing
    return (-(1 - e) * nn.log_sigmoid(logits) + e * nn.log_sigmoid(-logits)) / (1 - 2 * e)


def hinge(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """SLiC's hinge on DPO's rewards (Zhao et al. 2023, arXiv:2305.10425): max(0, 1 - beta h)."""
    return mx.maximum(0, 1 - s.beta * _log_ratio_difference(pi, ref))


def ipo(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17): (h - 1 / (2 beta))^2, beta being tau.

    As in the authors' code and in TRL, h compares log-probs per token. So beta does not depend on
    the answers' lengths.
    """
    return mx.square(_per_token_difference(pi, ref, length) - 1 / (2 * s.beta))


def sigmoid_norm(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """Length-normalised DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124, eq. 6).

    -log sigma(beta ((pi_chosen - ref_chosen) / n_chosen - (pi_rejected - ref_rejected) /
    n_rejected)). Log-probs per token are about a hundred times smaller than sums, so beta is 2 to
    10.
    """
    return -nn.log_sigmoid(s.beta * _per_token_difference(pi, ref, length))


def simpo(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6), which needs no reference.

    -log sigma(beta pi_chosen / n_chosen - beta pi_rejected / n_rejected - gamma).
    """
    margin = pi.chosen / length.chosen - pi.rejected / length.rejected
    return -nn.log_sigmoid(s.beta * margin - s.simpo_gamma)


def apo_zero(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): chosen up, rejected down.

    1 - sigma(beta (pi_chosen - ref_chosen)) + sigma(beta (pi_rejected - ref_rejected)).
    """
    ratio = _log_ratios(pi, ref)
    return 1 - mx.sigmoid(s.beta * ratio.chosen) + mx.sigmoid(s.beta * ratio.rejected)


def apo_down(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """APO-down (arXiv:2408.06266, eq. 8): both answers down, the rejected one further.

    sigma(beta (pi_chosen - ref_chosen)) + 1 - sigma(beta h).
    """
    ratio = _log_ratios(pi, ref)
    return (
        1 + mx.sigmoid(s.beta * ratio.chosen) - mx.sigmoid(s.beta * (ratio.chosen - ratio.rejected))
    )


def dpop(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """DPO-Positive (Pal et al. 2024, Smaug, arXiv:2402.13228, eq. 3).

    -log sigma(beta (h - lambda max(0, ref_chosen - pi_chosen))). The last term is a penalty when
    the chosen answer becomes less likely than under the reference.
    """
    fall = mx.maximum(0, ref.chosen - pi.chosen)
    return -nn.log_sigmoid(s.beta * (_log_ratio_difference(pi, ref) - s.dpop_lambda * fall))


LOSSES: dict[str, Loss] = {
    f.__name__: f
    for f in (sigmoid, robust, hinge, ipo, sigmoid_norm, simpo, apo_zero, apo_down, dpop)
}


def preference_loss(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """The loss that `dpo.loss` names."""
    return LOSSES[s.loss](pi, ref, length, s)


def objective(pi: Arrays, ref: Arrays, length: Arrays, s: Settings) -> mx.array:
    """What DPO minimises: the preference loss plus nll_weight times the chosen answer's negative
    log-likelihood, in nats per token (RPO, Pang et al. 2024, arXiv:2404.19733, eq. 1).
    """
    return preference_loss(pi, ref, length, s) - s.nll_weight * pi.chosen / length.chosen


def rewards(pi: Arrays, ref: Arrays, beta: float) -> Arrays:
    """DPO's implicit rewards beta (pi - ref) (arXiv:2305.18290, section 4), in nats x beta."""
    ratio = _log_ratios(pi, ref)
    return Sides(beta * ratio.chosen, beta * ratio.rejected)


def _log_ratios(pi: Arrays, ref: Arrays) -> Arrays:
    return Sides(pi.chosen - ref.chosen, pi.rejected - ref.rejected)


def _log_ratio_difference(pi: Arrays, ref: Arrays) -> mx.array:
    """h of the equations: how much more the policy prefers chosen than the reference does."""
    ratio = _log_ratios(pi, ref)
    return ratio.chosen - ratio.rejected


def _per_token_difference(pi: Arrays, ref: Arrays, length: Arrays) -> mx.array:
    ratio = _log_ratios(pi, ref)
    return ratio.chosen / length.chosen - ratio.rejected / length.rejected
