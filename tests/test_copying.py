"""Copying: the share of an answer that stands in the training answers."""

from __future__ import annotations

import pytest
from dpo_mlx.voice.copying import RUN, copied_share, runs

TRAINING = ["One two three four five six seven eight nine.", "A short one."]


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ([], 0.0),
        (["", "too short to have a run"], 0.0),
        (["one TWO three four five six seven eight nine."], 1.0),  # two runs, both known
        (["one two three four five six seven eight or so"], 1 / 3),
        (["zero one two three four five six seven"], 0.0),  # seven known words in a row
        (["one two three four five six seven eight", "a b c d e f g h"], 1 / 2),
    ],
)
def test_copied_share_by_hand(answers, share):
    """Runs are counted over all answers together, so that a long answer weighs more."""
    assert copied_share(answers, {*runs(TRAINING)}) == pytest.approx(share)


def test_a_reciting_model_is_seen_in_any_script():
    """Without blanks a run has as many characters."""
    text = "天空之所以是蓝色的是因为空气"
    assert len(text) > RUN and copied_share([text], {*runs([f"前面{text}后面"])}) == 1.0
    assert copied_share([text], {*runs([text[::-1]])}) == 0.0
