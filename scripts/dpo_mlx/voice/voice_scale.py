"""The voice scale: 0 is the base model, 1 is the author."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.pairs import Pair
from .signature import Signature, find_signature


@dataclass(frozen=True)
class VoiceScale:
    """Places texts between the base model's held-out answers and the author's.

    `floor` and `ceiling` are the mean evidence in the two (see `Signature`).
    """

    signature: Signature
    floor: float
    ceiling: float

    def places(self, texts: Sequence[str]) -> np.ndarray:
        """Each text's place, [len(texts)] float64. A single text can lie below 0 or above 1.

        All are 0 when the author's answers show no more evidence than the base model's.
        """
        if self.ceiling <= self.floor:
            return np.zeros(len(texts))
        return (self.signature.evidence(texts) - self.floor) / (self.ceiling - self.floor)


def voice_scale(train: Sequence[Pair], valid: Sequence[Pair]) -> VoiceScale:
    """The scale of a run: the signature from its train pairs, the ends from its valid pairs."""
    signature = find_signature(*_sides(train))
    ceiling, floor = (float(signature.evidence(side).mean()) for side in _sides(valid))
    return VoiceScale(signature, floor, ceiling)


def _sides(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    return [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
