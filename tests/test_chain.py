"""The whole chain on a tiny Granite, through the runner, as a user starts it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf
import mlx.core as mx
import mlx_lm
import pytest
from conftest import REPOSITORY
from dpo_mlx.files import jsonl
from runs import NO_LIMITS

CONFIG = REPOSITORY / "config" / "mlx_granite-4.0-h-micro_dpo.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, granite: Path) -> dict[str, Any]:
    """The Granite config on the plan's text rows and a folder in the hub's own layout, run twice;
    what was printed and written.
    """
    folder = tmp_path_factory.mktemp("chain")
    model = hf.folder(granite, folder / "granite")
    source = folder / "train.jsonl"
    texts = [f"Question: Why is {n} so?\nAnswer: **It is {n}.** So take {n}." for n in range(40)]
    jsonl.write(source, [{"text": text} for text in texts])
    changes = {
        "model": model,
        "run_dir": folder / "run",
        "data.source": source,
        "data.train_pairs": folder / "dpo_train.jsonl",
        "data.valid_pairs": folder / "dpo_valid.jsonl",
        "generation.max_tokens": 16,
        "train.learning_rate": "1e-3",
        "smoke.questions": 4,
        **{f"smoke.{key}": value for key, value in NO_LIMITS.items()},
    }
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    alone = ["--launch", "none"]
    first, second = (_start([str(CONFIG), *alone, *sets]) for _ in range(2))
    return {"folder": folder, "first": first, "second": second, "sets": sets}


# So high a rate and so strict a guard that the first evaluation worse in anything ends the run.
RUINOUS = {
    "sft.epochs": 0,
    "train.learning_rate": 1,
    "train.schedule": "constant",
    "train.warmup_ratio": 0,
    "train.eval_every": 1,
    "train.force": "true",
    "guard.max_distinct2_drop": 0,
    "guard.min_self_ended_ratio": 1,
    "guard.max_chosen_drop": 0,
}


def _start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    # The tests' own environment counts as the active one.
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(REPOSITORY / "train_dpo_run1.sh"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_chain_ends_with_the_report(run: dict[str, Any]) -> None:
    """Every stage runs, the grade is printed, and the last line is the report's path. A random
    model learns no voice, so the exit code is that of a smoke test that failed.
    """
    first = run["first"]
    assert first.returncode == 1, first.stdout + first.stderr
    assert "12: unmoved. " in first.stdout
    assert first.stdout.splitlines()[-1] == str(run["folder"] / "run" / "report.html")
    assert "<|start_of_role|>user<|end_of_role|>Why is 0 so?" in first.stdout


def test_a_second_run_skips_every_stage(run: dict[str, Any]) -> None:
    """Unchanged inputs and settings: nothing is made again."""
    second = run["second"]
    assert second.returncode == 1, second.stdout + second.stderr
    for stage in ("06", "10", "11", "12"):
        assert any(
            line.startswith(f"{stage}: ") and line.endswith("up to date, skipped")
            for line in second.stdout.splitlines()
        ), f"stage {stage} was not skipped:\n{second.stdout}"


def test_training_starts_at_the_reference(run: dict[str, Any]) -> None:
    """Decision 5: before DPO's first update the loss is ln 2 and the margin 0, against the model
    that SFT left; updates are counted through both phases.
    """
    rows = jsonl.read_whole_lines(run["folder"] / "run" / "metrics.jsonl")
    first_evaluation, first_update, *_ = (row for row in rows if row["phase"] == "dpo")
    sft = [row["iteration"] for row in rows if row["phase"] == "sft"]
    assert first_evaluation["iteration"] == max(sft) > 0
    assert first_evaluation["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first_update["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first_update["rewards/margins"] == pytest.approx(0, abs=1e-4)
    updates = [row["iteration"] for row in rows if "nll_loss" in row]
    assert updates == list(range(1, len(updates) + 1))


def test_outputs_load_with_mlx_lm(run: dict[str, Any]) -> None:
    """Decision 8: mlx-lm reads the adapters and the fused model, and they answer."""
    folder, base = run["folder"] / "run", run["folder"] / "granite"
    for arguments in ((str(folder / "fused"), None), (str(base), str(folder / "adapters"))):
        model, tokenizer, *_ = mlx_lm.load(arguments[0], adapter_path=arguments[1])
        assert isinstance(mlx_lm.generate(model, tokenizer, "Hi", max_tokens=4), str)


def test_report_keeps_every_answer(run: dict[str, Any]) -> None:
    """report.json has the measures and the answers that anyone can measure again."""
    report = json.loads((run["folder"] / "run" / "report.json").read_text())
    assert {"verdict", "voice", "fluency", "preference", "fuse", "answers"} <= set(report)
    assert len(report["answers"]) == 4
    assert all(set(a) == {"question", "base", "tuned", "chosen"} for a in report["answers"])
    assert set(report["fluency"]["median_tokens"]) == {"base", "tuned", "chosen"}
    assert report["fuse"]["max_logprob_difference"] < 1e-2


def test_the_report_opens_from_disk(run: dict[str, Any]) -> None:
    """The page is whole and asks nothing of the network."""
    page = (run["folder"] / "run" / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "https://" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_stopped_run_is_told_to_its_end(run: dict[str, Any]) -> None:
    """Stopped by a guard (3), the chain still fuses the best adapters and writes the report, whose
    path is the last line; its exit code is that 3, though the smoke test finds no voice (1), now
    and when it is started again.
    """
    folder = run["folder"]
    again = {"run_dir": folder / "stopped", **RUINOUS}
    sets = [part for key, value in again.items() for part in ("--set", f"{key}={value}")]
    for _ in range(2):
        done = _start([str(CONFIG), *run["sets"], *sets])
        assert done.returncode == 3, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == str(folder / "stopped" / "report.html")
        assert "10: stopped after update" in done.stdout
    report = json.loads((folder / "stopped" / "report.json").read_text())
    assert not report["verdict"]["passed"]
    training = report["training"]
    assert training["stopped"] and training["kept"]["update"] < training["updates"]


def test_two_processes_make_the_same_report(run: dict[str, Any], tmp_path: Path) -> None:
    """On a CPU stages 06 and 10 are shared by two processes, and the report's figures are those of
    one; both processes and the launcher are gone at the end.
    """
    moved = {
        "run_dir": tmp_path / "run",
        "data.train_pairs": tmp_path / "dpo_train.jsonl",
        "data.valid_pairs": tmp_path / "dpo_valid.jsonl",
    }
    sets = [part for key, value in moved.items() for part in ("--set", f"{key}={value}")]
    shared = _start([str(CONFIG), *run["sets"], *sets])
    assert shared.returncode == 1, shared.stdout + shared.stderr
    for_two = mx.default_device() == mx.cpu and (os.cpu_count() or 1) >= 2
    assert ("-- two processes" in shared.stdout) == for_two
    assert shared.stdout.count("06: the prompt of the first question") == 1
    mine, alone = (
        json.loads((folder / "run/report.json").read_text()) for folder in (tmp_path, run["folder"])
    )
    assert mine["preference"] == pytest.approx(alone["preference"], rel=1e-4, abs=1e-4)
    assert mine["voice"]["way"] == pytest.approx(alone["voice"]["way"], rel=1e-4, abs=1e-4)
    assert mine["cost"]["divergence"] == pytest.approx(
        alone["cost"]["divergence"], rel=1e-2, abs=1e-3
    )
    assert mine["answers"] == alone["answers"]
