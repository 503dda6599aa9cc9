"""The benchmark of recipes: candidates, its table, and answers that are measured again."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from dpo_mlx.files import jsonl
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.voice import cost

LETTERS = "abcdefghijkl"
ROWS = [
    {
        "prompt": f"Why {letter * 3}?",
        "chosen": f"**It is {letter}!** Yes.\n\nSo it goes.",
        "rejected": f"It is the letter {letter}, {place} times.",
        "rejected_finish": "stop",
    }
    for place, letter in enumerate(LETTERS)
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPOSITORY / "tests/benchmarks")
    return importlib.import_module("bench_outcome")


def arguments(bench: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["bench_outcome.py", *options])
    return bench.arguments()


def test_candidates_need_no_edit(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate stands where --recipes names it, else at the end."""
    candidate = ["--recipe", "slow=sft.epochs=3 sft.learning_rate=5e-5"]
    changes = ["sft.epochs=3", "sft.learning_rate=5e-5"]
    for names, expected in (
        ("shipped,SFT alone", ["shipped", "SFT alone", "slow"]),
        ("slow,SFT alone,shipped", ["slow", "SFT alone", "shipped"]),
    ):
        recipes = arguments(bench, monkeypatch, *candidate, "--recipes", names).recipes
        assert [name for name, _ in recipes] == expected
        assert dict(recipes)["slow"] == changes and dict(recipes)["shipped"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "a=sft.epoch=3"], "sft.epoch: unknown key"),
        (["--recipe", "../a=sft.epochs=3"], "with a new name"),
        (["--recipe", "shipped=sft.epochs=3"], "with a new name"),
        (["--recipes", "shiped"], "no shiped"),
        (["--recipes", "SFT alone"], "name one"),
    ],
)
def test_wrong_recipes_are_refused_before_any_run(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        arguments(bench, monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_a_line_of_the_table_by_hand(bench: Any) -> None:
    """The differences and ratios of a made report, and a word-for-word loop of 9 words."""
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    row = {
        "recipe": "shipped",
        "seed": 1,
        "voice": {"way": interval, "detection": {"tuned": interval}},
        "fluency": {
            "distinct2": {"base": 0.75, "tuned": 1.0},
            "self_ended": {"base": 0.5, "tuned": 0.75},
            "base_logprob_per_token": {"base": -1.0, "tuned": -1.5},
            "sense": {"tuned": 0.4, "chosen": 0.8},
            "median_tokens": {"tuned": 90.0, "chosen": 100.0},
            "copied": {"tuned": 0.125},
        },
        "habits": [{"carried": True}, {"carried": False}, {"carried": True}],
        "cost": {
            "divergence": {"value": 0.0625},
            "instructions": {"base": 0.5, "tuned": 0.25},
            "choices": {"base": 0.25, "tuned": 0.5},
        },
        "dpo_added": None,
        "above_base": 0.9,
        "longest_loops": {"tuned": [0, 8, 9]},
        "verdict": {"grade": "on the way"},
        "minutes": 2.0,
        "is_partial": True,
        "kept_update": 7,
        "updates": 9,
        "stopped": ["a limit"],
    }
    line = bench.line(row)
    assert line == {
        "recipe": "shipped",
        "seed": 1,
        "way": "0.50 [0.25..0.75]",
        "detector": "0.50 [0.25..0.75]",
        "habits": "2/3",
        "sense": "0.40/0.80",
        "copied": 0.125,
        "d2": 0.25,
        "loops": "1/3",
        "ended": 1.5,
        "nats": -0.5,
        "length": 0.9,
        "KL": 0.0625,
        "instr": -0.25,
        "choices": 0.25,
        "DPO - SFT": None,
        "old": "yes",
        "grade": "on the way",
        "minutes": "2.0+",
        "kept, of": "7, 9*",
    }


def test_saved_answers_are_measured_again_without_a_model(
    bench: Any, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs resume from their saved answers, and measuring these again gives the same reports."""
    pairs = {"data.train_pairs": ROWS[:8], "data.valid_pairs": ROWS[8:]}
    for key, rows in pairs.items():
        jsonl.write(tmp_path / f"{key}.jsonl", rows)
    task: dict[str, Any] = {
        "overrides": [
            *(f"{key}={tmp_path / key}.jsonl" for key in pairs),
            f"run_dir={tmp_path}",
            f"model={llama}",
            "demo_model=false",
            "generation.max_tokens=8",
            "smoke.unrelated_tasks=2",
            "train.force=true",
            "train.grad_accumulation=4",
            "sft.epochs=1",
            "guard.enabled=false",
        ],
        "recipes": [
            ("low", ["train.learning_rate=1e-6"]),
            ("SFT alone", []),
            ("high", ["train.learning_rate=1e-4"]),
            ("missing", []),
        ],
        "again": False,
    }
    first = {**task, "recipes": task["recipes"][:3]}
    reports = list(bench.reports(first))
    assert [report["recipe"] for report in reports] == ["low", "low, SFT alone", "high"]
    assert [report["place"] for report in reports] == [0, 1, 2]
    assert reports[0]["dpo_added"] is not None and reports[1]["dpo_added"] is None
    assert [report["is_partial"] for report in reports] == [False, False, True]  # SFT was copied
    bench.common.table("reports", [bench.line({**report, "seed": 0}) for report in reports])

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was asked")

    monkeypatch.setattr(Worker, "log_probs", fail)
    monkeypatch.setattr(Worker, "answers", fail)
    assert list(bench.reports(first)) == reports
    assert list(bench.reports({**task, "again": True})) == reports


def test_a_run_at_the_end_of_sft(bench: Any) -> None:
    """Its answers are those of SFT. A run without SFT has none."""
    output = bench.recipe_runs.Output([], cost.ModelResults([], [], []))
    end = replace(output, answers=[bench.recipe_runs.Answer("At its end.", "stop", 3)])
    run = bench.recipe_runs.Run("a", 9, 6, 8, ["a limit"], 2.0, False, output, end)
    at_end = run.at_end_of_sft
    assert at_end.kept == end
    assert (at_end.updates, at_end.kept_update, at_end.stopped) == (6, 6, [])
    assert replace(run, end_of_sft=None).at_end_of_sft is None


def test_pairs_of_another_seed_folder_are_refused(bench: Any, tmp_path: Path) -> None:
    """Runs on other pairs stay as they are."""
    files = [tmp_path / "train.jsonl", tmp_path / "valid.jsonl"]
    bench.write_pairs(Namespace(train=5, held=3), ROWS, 0, files)
    contents = [file.read_bytes() for file in files]
    bench.write_pairs(Namespace(train=5, held=3), ROWS, 0, files)
    with pytest.raises(SystemExit, match="has runs on other pairs"):
        bench.write_pairs(Namespace(train=6, held=3), ROWS, 0, files)
    with pytest.raises(SystemExit, match="12 pairs, but --train and --held need 13"):
        bench.write_pairs(Namespace(train=10, held=3), ROWS, 0, files)
    assert [file.read_bytes() for file in files] == contents
