"""How training ended, in words for the user."""

from __future__ import annotations

from collections.abc import Iterator

from ..files.results import Evaluation, Outcome
from ..voice import intervals
from ..voice.intervals import Interval


def describe(outcome: Outcome) -> Iterator[str]:
    """Why training stopped early, if it did; and which update was kept."""
    for reason in outcome.stopped:
        yield f"stopped after update {outcome.updates}: {reason}"
    if outcome.stopped:
        yield (
            "try a lower train.learning_rate (and sft.learning_rate), or a higher dpo.beta or "
            "dpo.nll_weight"
        )
    yield (
        f"kept update {outcome.kept_update} of {outcome.updates} ({place(outcome)}): voice "
        f"{outcome.kept.voice:.2f}. {comparison(outcome)}"
    )
    if hint := advice(outcome):
        yield hint


def place(outcome: Outcome) -> str:
    """Where the kept update is in the run: before training, within a phase, or at its end."""
    kept_update, sft_updates = outcome.kept_update, outcome.sft_updates
    if kept_update == 0:
        return "before training"
    if kept_update == sft_updates:
        return "the end of SFT"
    if kept_update < sft_updates:
        return "in SFT"
    if kept_update == outcome.updates and not outcome.stopped:
        return "the end of DPO"
    return "in DPO"


def comparison(outcome: Outcome) -> str:
    """Whether the later phases improved on the kept update, or DPO on what came before it."""
    kept_update, sft_updates = outcome.kept_update, outcome.sft_updates
    if kept_update > sft_updates:
        return _gain(outcome)
    if kept_update == 0:
        return (
            "Training stopped before it improved on the base model."
            if outcome.stopped
            else "Training did not improve on the base model."
        )
    if outcome.updates <= sft_updates:
        return "Training stopped before DPO."
    if outcome.stopped:
        return "Training stopped before DPO improved on it."
    if kept_update < sft_updates:
        return "Neither the rest of SFT nor DPO improved on it."
    return "This is the supervised model: DPO did not improve on it."


def _gain(outcome: Outcome) -> str:
    """By how much DPO improved, and whether chance may explain it."""
    if outcome.end_of_sft is None:
        return "DPO improved on the base model."
    gain = voice_gain(outcome.end_of_sft, outcome.kept)
    if gain.low > 0:
        return "DPO improved on SFT."
    return (
        f"DPO's answers are {gain.value:.2f} of the way nearer to your voice than SFT's, which may "
        "be chance."
    )


def voice_gain(before: Evaluation, after: Evaluation) -> Interval:
    """By how much the voice of the answers to the same questions rose."""
    return intervals.difference(after.measures.voice, before.measures.voice)


def advice(outcome: Outcome) -> str | None:
    """What to try when DPO ran to its end and the supervised model is still the best one."""
    if outcome.stopped or outcome.kept_update != outcome.sft_updates or not outcome.kept_update:
        return None
    return "To give DPO more to work with, add pairs, or raise train.learning_rate or train.epochs."
