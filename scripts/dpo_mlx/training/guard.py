"""The guard: compares an evaluation with the base model, and chooses the best checkpoint."""

from __future__ import annotations

from ..config import GuardConfig
from ..files.results import Evaluation, Measures


def better(best: Evaluation | None, evaluation: Evaluation, crossed: list[str]) -> Evaluation:
    """The best evaluation once this one is known, which crossed these limits.

    The first evaluation of a run always becomes the best. A later one must cross no limit and have
    a higher mean on the voice scale, up to your own 1: of equal ones the earlier wins, which has
    moved less.
    """
    if best is None or (min(evaluation.voice, 1.0) > best.voice and not crossed):
        return evaluation
    return best


def crossed_limits(
    limits: GuardConfig, base: Measures, measures: Measures, chosen_change: float
) -> list[str]:
    """One line for each limit that an evaluation crosses: the key, the values and what they mean.

    `base` are the measures of the base model's answers. `chosen_change` is how much more likely the
    chosen answers of the valid pairs are than under the reference, in nats per token. NaN
    and infinities cross their limit.
    """
    crossed, base_means, means = [], base.means, measures.means
    drop = base_means["distinct2"] - means["distinct2"]
    if not drop <= limits.max_distinct2_drop:
        crossed.append(
            "guard.max_distinct2_drop: distinct word pairs fell from "
            f"{base_means['distinct2']:.2f} to {means['distinct2']:.2f}: the answers repeat "
            "themselves"
        )
    if not means["self_ended"] >= limits.min_self_ended_ratio * base_means["self_ended"]:
        crossed.append(
            f"guard.min_self_ended_ratio: {means['self_ended']:.0%} of the answers end by "
            f"themselves, against {base_means['self_ended']:.0%} of the base model's: the model "
            "forgets to stop"
        )
    if not -chosen_change <= limits.max_chosen_drop:
        crossed.append(
            f"guard.max_chosen_drop: your answers fell by {-chosen_change:.2f} nats per token "
            "below the reference: the model finds them less likely than at the start of this phase"
        )
    if not means["divergence"] <= limits.max_divergence:
        crossed.append(
            f"guard.max_divergence: on unrelated prompts the model is {means['divergence']:.2f} "
            "nats per token away from the base model: it changes more than the voice"
        )
    return crossed
