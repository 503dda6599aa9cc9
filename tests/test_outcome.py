"""The last line of stage 10: which update is kept, and whether DPO improved on SFT."""

from __future__ import annotations

import pytest
from dpo_mlx.files.results import Evaluation, Measures, Outcome
from dpo_mlx.training.outcome import describe
from runs import wrote

REASON = "guard.max_distinct2_drop: the answers repeat themselves"


def lines(updates: int, sft_updates: int, kept_update: int, stopped: bool = False) -> list[str]:
    reasons = [REASON] if stopped else []
    kept = Evaluation(kept_update, wrote(voice=0.56))
    before = Evaluation(sft_updates, wrote(voice=0.5)) if sft_updates else None
    return list(describe(Outcome(updates, sft_updates, before, kept, kept, reasons, [], "0" * 64)))


@pytest.mark.parametrize(
    ("updates", "sft_updates", "kept_update", "stopped", "place", "comparison"),
    [
        (21, 14, 0, False, "before training", "Training did not improve on the base model."),
        (21, 14, 5, False, "in SFT", "Neither the rest of SFT nor DPO improved on it."),
        (
            21,
            14,
            14,
            False,
            "the end of SFT",
            "This is the supervised model: DPO did not improve on it.",
        ),
        (21, 14, 17, False, "in DPO", "DPO improved on SFT."),
        (21, 14, 21, False, "the end of DPO", "DPO improved on SFT."),
        # Stopped in SFT, at its end before DPO's first update, and in DPO.
        (10, 14, 0, True, "before training", "Training stopped before it improved on the base"),
        (10, 14, 5, True, "in SFT", "Training stopped before DPO."),
        (14, 14, 5, True, "in SFT", "Training stopped before DPO."),
        (14, 14, 14, True, "the end of SFT", "Training stopped before DPO."),
        (17, 14, 14, True, "the end of SFT", "Training stopped before DPO improved on it."),
        (17, 14, 5, True, "in SFT", "Training stopped before DPO improved on it."),
        (21, 14, 17, True, "in DPO", "DPO improved on SFT."),
        (21, 14, 21, True, "in DPO", "DPO improved on SFT."),
        # Without SFT.
        (7, 0, 0, False, "before training", "Training did not improve on the base model."),
        (7, 0, 4, False, "in DPO", "DPO improved on the base model."),
        (7, 0, 7, False, "the end of DPO", "DPO improved on the base model."),
        (4, 0, 0, True, "before training", "Training stopped before it improved on the base"),
        (4, 0, 2, True, "in DPO", "DPO improved on the base model."),
    ],
)
def test_the_last_line(updates, sft_updates, kept_update, stopped, place, comparison):
    """It is right wherever the kept update is, and wherever training stopped. Only after a DPO that
    did not help comes a hint what to try.
    """
    start = f"kept update {kept_update} of {updates} ({place}): voice 0.56. {comparison}"
    last, *hint = lines(updates, sft_updates, kept_update, stopped)[2 if stopped else 0 :]
    assert last.startswith(start)
    assert bool(hint) == ("supervised model" in comparison)


def test_a_stop_is_explained():
    """The reason and a remedy come before the last line; a whole run prints that line alone."""
    reason, remedy, _ = lines(17, 14, 14, stopped=True)
    assert reason == f"stopped after update 17: {REASON}"
    assert "lower train.learning_rate" in remedy
    assert len(lines(21, 14, 21)) == 1


@pytest.mark.parametrize(
    ("kept", "last", "of_dpo"), [(6, 9, 9), (8, 9, 8), (9, 9, 9), (6, 6, None), (4, 6, None)]
)
def test_the_evaluation_of_dpo(kept: int, last: int, of_dpo: int | None) -> None:
    """With 6 updates of SFT: the kept one if DPO made it, otherwise DPO's last, if it began."""
    sft, end, best = (Evaluation(update, wrote()) for update in (6, last, kept))
    outcome = Outcome(9, 6, sft, end, best, [], [], "0" * 64)
    assert (outcome.of_dpo and outcome.of_dpo.update) == of_dpo


@pytest.mark.parametrize(
    ("voice", "comparison"),
    [
        ([0.75, 0.75, 0.75], "DPO improved on SFT."),
        (
            [0.0, 0.75, 1.0],
            "DPO's answers are 0.08 of the way nearer to your voice than SFT's, which",
        ),
    ],
)
def test_a_gain_that_may_be_chance_is_no_improvement(voice: list[float], comparison: str) -> None:
    """Over three questions on which SFT's answers are half of the way."""
    before = Evaluation(6, Measures([0.5] * 3, wrote().means))
    kept = Evaluation(9, Measures(voice, wrote().means))
    line = list(describe(Outcome(9, 6, before, kept, kept, [], [], "0" * 64)))[-1]
    assert comparison in line
