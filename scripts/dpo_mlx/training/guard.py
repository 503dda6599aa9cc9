"""The guard: compares an evaluation with the base model, and chooses the best checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import GuardConfig
from ..files.schema import Count, Finite, Share
from ..voice.answers import Measures

# Two voice scores this close count as equal: the mean of eight answers is no more precise.
EQUAL_VOICE = 0.05


@dataclass(frozen=True)
class Evaluation:
    """The scores that two checkpoints are compared by.

    `voice` is the mean voice score. `fluency` is distinct word pairs plus the share of answers that
    end by themselves.
    """

    update: Count
    voice: Share
    fluency: Finite

    @classmethod
    def of(cls, update: int, measures: Measures) -> Evaluation:
        """The evaluation after `update`, whose answers have these measures."""
        return cls(update, measures["voice"], measures["distinct2"] + measures["self_ended"])

    def is_better_than(self, other: Evaluation) -> bool:
        """Whether its voice score is higher, or equal and its answers more fluent."""
        if abs(self.voice - other.voice) > EQUAL_VOICE:
            return self.voice > other.voice
        return (self.fluency, self.voice) > (other.fluency, other.voice)


def better(best: Evaluation | None, evaluation: Evaluation, crossed: list[str]) -> Evaluation:
    """The best evaluation once this one is known, which crossed these limits.

    The first evaluation of a run always becomes the best. A later one must cross no limit.
    """
    if best is None or (evaluation.is_better_than(best) and not crossed):
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
    crossed = []
    drop = base["distinct2"] - measures["distinct2"]
    if not drop <= limits.max_distinct2_drop:
        crossed.append(
            f"guard.max_distinct2_drop: distinct word pairs fell from {base['distinct2']:.2f} "
            f"to {measures['distinct2']:.2f}: the answers repeat themselves"
        )
    if not measures["self_ended"] >= limits.min_self_ended_ratio * base["self_ended"]:
        crossed.append(
            f"guard.min_self_ended_ratio: {measures['self_ended']:.0%} of the answers end by "
            f"themselves, against {base['self_ended']:.0%} of the base model's: the model forgets "
            "to stop"
        )
    if not -chosen_change <= limits.max_chosen_drop:
        crossed.append(
            f"guard.max_chosen_drop: your answers fell by {-chosen_change:.2f} nats per token "
            "below the reference: the model finds them less likely than at the start of this phase"
        )
    return crossed
