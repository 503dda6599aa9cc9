"""Which adapters are worth keeping, and when training must stop: by what the model writes."""

from __future__ import annotations

from dataclasses import dataclass

from .config import GuardConfig
from .typed import Count, Finite, Share
from .writing import Measures

# Voice scores so near to each other are alike: the mean of eight answers is no surer than that.
ALIKE = 0.05


@dataclass(frozen=True)
class Kept:
    """The update whose adapters are kept, the voice score of what it wrote, and how fluent that
    was: distinct word pairs and the share that ends by itself, added.
    """

    update: Count
    voice: Share
    fluency: Finite

    @classmethod
    def of(cls, update: int, written: Measures) -> Kept:
        return cls(update, written["voice"], written["distinct2"] + written["self_ended"])

    def is_better_than(self, other: Kept) -> bool:
        """More in the voice, or about as much and more fluent."""
        if abs(self.voice - other.voice) > ALIKE:
            return self.voice > other.voice
        return (self.fluency, self.voice) > (other.fluency, other.voice)


class Guard:
    """Judges every evaluation of a run against the base model.

    The best adapters are, among those within the limits, those that write most in the voice, and of
    those that do so alike the most fluent.
    """

    def __init__(self, base: Measures, limits: GuardConfig, best: Kept | None = None) -> None:
        self.base = base
        self._limits = limits
        self.best = best

    @property
    def kept(self) -> Kept:
        """The best so far, of at least one evaluation."""
        assert self.best is not None
        return self.best

    def judge(self, update: int, written: Measures, chosen_change: float) -> list[str]:
        """Keep these adapters if they are the best so far; the first are, whatever they write. What
        they cross is told as by `crossed`.
        """
        found, crossed = Kept.of(update, written), self.crossed(written, chosen_change)
        if self.best is None or (found.is_better_than(self.best) and not crossed):
            self.best = found
        return crossed

    def crossed(self, written: Measures, chosen_change: float) -> list[str]:
        """A line for each limit crossed: the key, the value found, and what it means.

        `chosen_change` is how far the chosen answers of the valid pairs moved from the reference,
        in nats a token. A number that is not finite crosses its limit.
        """
        limits, base = self._limits, self.base
        drop = base["distinct2"] - written["distinct2"]
        found = []
        if not drop <= limits.max_distinct2_drop:
            found.append(
                f"guard.max_distinct2_drop: distinct word pairs fell from {base['distinct2']:.2f} "
                f"to {written['distinct2']:.2f}: the answers repeat themselves"
            )
        if not written["self_ended"] >= limits.min_self_ended_ratio * base["self_ended"]:
            found.append(
                f"guard.min_self_ended_ratio: {written['self_ended']:.0%} of the answers end by "
                f"themselves, {base['self_ended']:.0%} of the base model's: it forgets to stop"
            )
        if not -chosen_change <= limits.max_chosen_drop:
            found.append(
                f"guard.max_chosen_drop: chosen answers fell by {-chosen_change:.2f} nats a token "
                "below the reference: both sides are unlearned"
            )
        return found
