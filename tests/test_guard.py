"""The guard: each limit by hand, which checkpoint is kept, and how a run that degenerates ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from dpo_mlx.config import Config, GuardConfig
from dpo_mlx.files import digest, jsonl
from dpo_mlx.files.results import Evaluation, Measures
from dpo_mlx.scoring.scorer import Scorer
from dpo_mlx.stages.train_dpo import train_dpo
from dpo_mlx.training.guard import better, crossed_limits
from mlx.utils import tree_map
from runs import differences, exit_code, saved, wrote

LIMITS = GuardConfig(
    max_distinct2_drop=0.25, min_self_ended_ratio=0.5, max_chosen_drop=0.5, max_divergence=0.5
)
BASE = wrote(distinct2=1.0, self_ended=0.5)
REPEATS, RUNS_ON, UNLEARNED, DIVERGED = (
    f"guard.{key}"
    for key in ("max_distinct2_drop", "min_self_ended_ratio", "max_chosen_drop", "max_divergence")
)


# The limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "chosen_change", "crossed"),
    [
        ({}, 0.0, []),
        ({"voice": 0.0, "longest_loop": 9.0, "median_tokens": 0.0}, 9.0, []),
        # at the limit itself, and a step beyond: 1 - 1/4, half of 1/2, -1/2
        ({"distinct2": 0.75}, 0.0, []),
        ({"distinct2": 0.74}, 0.0, [REPEATS]),
        ({"self_ended": 0.25}, 0.0, []),
        ({"self_ended": 0.24}, 0.0, [RUNS_ON]),
        ({}, -0.5, []),
        ({}, -0.51, [UNLEARNED]),
        ({"divergence": 0.5}, 0.0, []),
        ({"divergence": 0.51}, 0.0, [DIVERGED]),
        # what is not a number is beyond every limit
        ({"divergence": math.nan}, 0.0, [DIVERGED]),
        ({"distinct2": math.nan}, 0.0, [REPEATS]),
        ({"self_ended": math.nan}, 0.0, [RUNS_ON]),
        ({}, math.nan, [UNLEARNED]),
        ({}, -math.inf, [UNLEARNED]),
        ({"distinct2": 0.0, "self_ended": 0.0}, -9.0, [REPEATS, RUNS_ON, UNLEARNED]),
    ],
)
def test_limits_by_hand(changes, chosen_change, crossed):
    """Each limit against the base model's 1.0 distinct pairs and 0.5 ended answers: not crossed at
    its exact value, crossed beyond it and by NaN, alone and together.
    """
    written = wrote(**{"self_ended": 0.5, **changes})
    found = crossed_limits(LIMITS, BASE, written, chosen_change)
    assert [line.split(":")[0] for line in found] == crossed


def test_a_base_that_never_ends_asks_for_nothing():
    """If the base model ends no answer, the tuned model need not end any."""
    never = wrote(self_ended=0.0)
    assert crossed_limits(LIMITS, never, never, 0.0) == []


def test_lines_carry_both_numbers():
    """A line says from where to where the value fell, and what that means."""
    lines = crossed_limits(LIMITS, BASE, wrote(distinct2=0.125, self_ended=0.125), -2.0)
    for line, words in zip(
        lines,
        [("from 1.00 to 0.12", "repeat"), ("12%", "50%", "stop"), ("2.00 nats", "less likely")],
        strict=True,
    ):
        assert all(word in line for word in words)


# What is kept -----------------------------------------------------------------------------------


def best_after_each(
    evaluations: list[tuple[Measures, float]], base: Measures = BASE, limits: GuardConfig = LIMITS
) -> list[tuple[int, float]]:
    """(update, voice) of the best evaluation after each of these, of updates 0, 1, ..., each
    (measures, change of the chosen answers).
    """
    best, bests = None, []
    for update, (measures, chosen_change) in enumerate(evaluations):
        crossed = crossed_limits(limits, base, measures, chosen_change)
        best = better(best, Evaluation(update, measures), crossed)
        bests.append((best.update, best.voice))
    return bests


def test_the_first_evaluation_is_kept_whatever_it_writes():
    """There is always a best checkpoint: the first one, even if it is degenerate."""
    assert best_after_each([(wrote(voice=0.5, distinct2=0.0), math.nan)]) == [(0, 0.5)]


@pytest.mark.parametrize(
    ("changes", "chosen_change"),
    [({"distinct2": 0.0}, 0.0), ({"self_ended": 0.0}, 0.0), ({}, -9.0)],
)
def test_more_voiced_but_degenerate_is_never_kept(changes, chosen_change):
    """Whichever limit it crosses, and whether or not the guard stops runs."""
    for limits in (LIMITS, GuardConfig(enabled=False)):
        evaluations = [(wrote(voice=0.25), 0.0), (wrote(voice=1.0, **changes), chosen_change)]
        assert best_after_each(evaluations, limits=limits)[-1] == (0, 0.25)


def test_the_nearest_to_the_voice_is_kept():
    """The highest mean on the voice scale wins. Of equal ones the earlier wins, which has moved
    less, so a later phase wins only if it is better. NaN never wins.
    """
    voices = [0.25, 0.5, 0.5, math.nan, 0.375, 0.75, 1.0, 1.5]
    bests = best_after_each([(wrote(voice=v), 0.0) for v in voices])
    assert bests[:5] == [(0, 0.25), (1, 0.5), (1, 0.5), (1, 0.5), (1, 0.5)]
    assert bests[5:] == [(5, 0.75), (6, 1.0), (6, 1.0)]  # more of it than you have is no better


# A whole run ------------------------------------------------------------------------------------


# What the model "writes" after updates 2, 4 and 6; at the start it writes what the base does.
DEGENERATES = [wrote(voice=0.75), wrote(voice=1.0, distinct2=0.5), wrote(voice=0.875)]


def outcome_of(config: Config) -> dict[str, Any]:
    """The contents of outcome.json, without the digest of the adapters, which is checked here."""
    outcome = json.loads((config.run.path / "outcome.json").read_text())
    assert outcome.pop("adapters") == digest.of_file(
        config.run.path / "adapters/adapters.safetensors"
    )
    kept = outcome.pop("kept")
    assert outcome.pop("end_of_sft") is None and outcome.pop("last")["update"] >= kept["update"]
    del outcome["notes"]  # of the preflight, which has its own tests
    return outcome | {"kept_update": kept["update"], "voice": kept["measures"]["means"]["voice"]}


def test_a_run_that_degenerates_is_stopped(job, capfd):
    """A run stopped at update 4 keeps update 2: adapters/ is its checkpoint, outcome.json and the
    last lines give the reason, and the exit code is 3. A second start is skipped and says the same.
    """
    config, path = job(DEGENERATES)
    assert exit_code(path) == 3
    outcome = outcome_of(config)
    [reason] = outcome.pop("stopped")
    assert outcome == {"sft_updates": 0, "updates": 4, "kept_update": 2, "voice": 0.75}
    assert reason.startswith("guard.max_distinct2_drop: distinct word pairs fell from 1.00 to 0.50")
    printed = capfd.readouterr().out.splitlines()[-3:]
    assert printed[0] == f"10: stopped after update 4: {reason}"
    assert "lower train.learning_rate" in printed[1] and "kept update 2 of 4" in printed[2]

    kept = saved(config.run.path / "adapters")
    assert differences(kept, saved(config.run.path / "checkpoints/dpo-000002")) == 0
    assert differences(kept, saved(config.run.path / "checkpoints/dpo-000004")) > 0
    rows = jsonl.read_whole_lines(config.run.path / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    assert max(row["iteration"] for row in rows) == 4

    changed = config.run.path / "adapters/adapters.safetensors"
    before = changed.stat().st_mtime_ns
    assert exit_code(path) == 3
    again = capfd.readouterr().out.splitlines()
    assert "up to date, skipped" in again[0] and again[1:] == printed
    assert changed.stat().st_mtime_ns == before


def test_a_guard_that_is_off_does_not_stop(job):
    """With the same answers the run reaches its end with exit code 0, and keeps an update within
    the limits.
    """
    config, path = job([*DEGENERATES, wrote(voice=0.5)], guard={"enabled": False})
    assert exit_code(path) == 0
    outcome = outcome_of(config)
    assert outcome == {
        "sft_updates": 0,
        "updates": 7,
        "kept_update": 6,
        "voice": 0.875,
        "stopped": [],
    }


def test_chosen_answers_that_fall_stop_a_run(job):
    """The fall is measured by log-probs, whatever the answers are: here the valid pairs prefer the
    opposite of the train pairs.
    """
    config, _ = job([wrote(voice=1.0)], train={"force": True}, guard={"max_chosen_drop": 0.01})
    rows = jsonl.read_whole_lines(Path(config.data.valid_pairs))
    opposite = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    jsonl.write(Path(config.data.valid_pairs), opposite)
    assert train_dpo(config) is False
    outcome = json.loads((config.run.path / "outcome.json").read_text())
    assert outcome["stopped"][0].startswith("guard.max_chosen_drop: ")
    assert (outcome["updates"], outcome["kept"]["update"]) == (2, 0)
    zeros = [v for n, v in saved(config.run.path / "adapters").items() if n.endswith("lora_b")]
    assert zeros and max(float(mx.abs(v).max()) for v in zeros) == 0


def test_gradients_that_are_not_finite_end_a_run_the_same_way(job, monkeypatch, capfd):
    """NaN from the fifth update on, with or without the guard: the exit code is 3, the reason names
    the last pair's line, and adapters/ holds the best evaluation before.
    """
    config, path = job(
        [wrote(voice=0.5), wrote(voice=0.75), wrote(voice=0.25)], guard={"enabled": False}
    )
    original, calls = Scorer.pair_gradient, []

    def broken(self, pair, *arguments):
        calls.append(pair.line)
        score, gradient = original(self, pair, *arguments)
        factor = 1 if len(calls) < 5 else mx.nan
        return score, tree_map(lambda g: g * factor, gradient)

    monkeypatch.setattr(Scorer, "pair_gradient", broken)
    assert exit_code(path) == 3
    outcome = outcome_of(config)
    [reason] = outcome.pop("stopped")
    assert outcome == {"sft_updates": 0, "updates": 7, "kept_update": 4, "voice": 0.75}
    assert reason.startswith("3 updates in a row")
    assert f"lines [{calls[6]}] of {config.data.train_pairs}" in reason and len(calls) == 7
    kept = saved(config.run.path / "adapters")
    assert differences(kept, saved(config.run.path / "checkpoints/dpo-000004")) == 0
    assert all(bool(mx.isfinite(value).all()) for value in kept.values())
    assert exit_code(path) == 3
    assert reason in capfd.readouterr().out.splitlines()[-3]
