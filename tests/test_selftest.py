"""The self-test passes here, and each of its checks can fail."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import REPOSITORY
from dpo_mlx.config import Config
from dpo_mlx.files import jsonl
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.ownership import MANIFEST
from dpo_mlx.model.adapters import load_adapters
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.scoring import memory
from dpo_mlx.stages import selftest
from dpo_mlx.training import checkpoint
from mlx_lm.models import granitemoehybrid
from virtual_mac import VirtualMac

SCRIPT = REPOSITORY / "scripts/phase1-check-machine/01_selftest.py"


@dataclass(frozen=True)
class Finished:
    """A finished self-test: its run with the folder still there, its output, and its mark."""

    config: Config
    passed: bool
    lines: list[str]
    mark: Path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The self-test on this machine as it is."""
    folder = tmp_path_factory.mktemp("selftest")
    config, printed, mark = selftest.make_run(folder), StringIO(), folder / "data/mark.json"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(selftest, "make_run", lambda _: config)
        passed = selftest.run(mark)
    return Finished(config, passed, printed.getvalue().splitlines(), mark)


@pytest.fixture
def copy(sound: Finished, tmp_path: Path) -> Config:
    """A copy of the sound run that a test may change."""
    shutil.copytree(sound.config.run.path, tmp_path / "run")
    return replace(sound.config, run_dir=str(tmp_path / "run"))


def run_one(
    check: Callable[[Config], str], config: Config, monkeypatch: pytest.MonkeyPatch, mark: Path
) -> bool:
    """Run one check on a run that exists already."""
    monkeypatch.setattr(selftest, "make_run", lambda folder: config)
    name = next(name for name, known in selftest.CHECKS.items() if known is check)
    monkeypatch.setattr(selftest, "CHECKS", {name: check})
    return selftest.run(mark)


def test_a_sound_machine_passes(sound: Finished) -> None:
    """Every check passes. The output names the machine first, then has a line for each check, then
    the verdict; the mark says what was tested.
    """
    checks = [line for line in sound.lines if line.startswith(("ok", "FAIL"))]
    assert len(checks) == 8
    assert [line for line in checks if not line.startswith("ok   ")] == []
    assert sound.passed
    assert sound.lines[0].startswith("device")
    assert "ok   checkpoint resumed = uninterrupted (largest difference 0)" in checks
    assert sound.lines[-1].startswith("passed: all 8 checks")
    tested = json.loads(sound.mark.read_text())
    assert tested.keys() == {*selftest.describe_machine(), "date", "seconds"}


def test_nothing_else_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's temporary folder is removed."""
    runs = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def check(config: Config) -> str:
        runs.append(config)
        return ""

    monkeypatch.setattr(selftest, "CHECKS", {"a check": check})
    assert selftest.run(tmp_path / "mark.json")
    assert Path(runs[0].model).is_relative_to(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mark.json", MANIFEST}


def test_a_virtual_mac_passes(virtual_mac: VirtualMac, tmp_path: Path) -> None:
    """The checks also pass where attention rounds differently while gradients are traced."""
    assert selftest.run(tmp_path / "mark.json")


def test_what_holds_is_told_apart_from_what_fails(
    sound: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A check that raises gets a line with the error's text, and later checks still run. An old
    mark is removed, and the last line asks for a report.
    """

    def raises(error: Exception) -> Callable[[Config], str]:
        def check(config: Config) -> str:
            print("what a stage prints is left out")
            raise error

        return check

    checks = {
        "a user's fault": raises(UserError("model: not there;\nset model")),
        "a bug": raises(KeyError("loss")),
        "a number": raises(selftest.Fault("largest difference 3")),
        "sound": lambda config: "difference 0",
    }
    monkeypatch.setattr(selftest, "make_run", lambda folder: sound.config)
    monkeypatch.setattr(selftest, "CHECKS", checks)
    mark = tmp_path / "mark.json"
    jsonl.write_json(mark, {})
    assert not selftest.run(mark)
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert lines[0] == "FAIL a user's fault (model: not there;; set model)"
    assert lines[1].startswith("FAIL a bug (KeyError: 'loss', at test_selftest.py:")
    assert lines[2:4] == ["FAIL a number (largest difference 3)", "ok   sound (difference 0)"]
    assert lines[4].startswith("failed: 3 of 4 checks") and "report all" in lines[4]
    assert not mark.exists()


def stop_training(config: Config, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(selftest, "train_dpo", lambda *_: False)


def start_off_the_reference(config: Config, patch: pytest.MonkeyPatch) -> None:
    rows = jsonl.read_whole_lines(config.run.path / "metrics.jsonl")
    for row in rows:
        if "rewards/margins" in row:
            row["rewards/margins"] += 0.01
    jsonl.write(config.run.path / "metrics.jsonl", rows)


def score_otherwise(config: Config, patch: pytest.MonkeyPatch) -> None:
    """Scores differ by as much as attention without gradients does on Metal."""
    exact = Worker.log_probs
    patch.setattr(Worker, "log_probs", lambda *a, **o: [x + 0.02 for x in exact(*a, **o)])


def let_mamba_hear_the_padding(config: Config, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(granitemoehybrid, "create_ssm_mask", lambda h, cache=None: None)


def let_attention_hear_the_padding(config: Config, patch: pytest.MonkeyPatch) -> None:
    def no_padding(h: mx.array, cache: Any = None) -> str | None:
        return None if h.shape[1] == 1 else "causal"

    patch.setattr(granitemoehybrid, "create_attention_mask", no_padding)


def plan_too_little(config: Config, patch: pytest.MonkeyPatch) -> None:
    training = memory.training

    def halved(*arguments: Any) -> memory.Need:
        exact = training(*arguments)
        return replace(exact, work=exact.work // 2)

    patch.setattr(memory, "training", halved)


def lose_the_optimizer(config: Config, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "restore", lambda path, model, _: load_adapters(model, path))


def fuse_badly(config: Config, patch: pytest.MonkeyPatch) -> None:
    report = jsonl.read_json(config.run.path / "fuse.json")
    jsonl.write_json(config.run.path / "fuse.json", {**report, "margin_kept": 0.5})


def forget_mamba_s_state(config: Config, patch: pytest.MonkeyPatch) -> None:
    """Loses state, as mlx-lm's Metal kernel does with a state that is not a multiple of 32."""
    update = granitemoehybrid.ssm_update

    def forgetful(x: mx.array, *arguments: Any) -> Any:
        y, state = update(x, *arguments)
        return y, mx.zeros_like(state) if x.shape[1] == 1 else state

    patch.setattr(granitemoehybrid, "ssm_update", forgetful)


FAULTS = [
    (selftest.check_chain, stop_training, "training was stopped"),
    (selftest.check_first_loss, start_off_the_reference, "margin 0.01"),
    (selftest.check_reference, score_otherwise, "0.02 nats per sequence"),
    (selftest.check_batch, let_mamba_hear_the_padding, "nats"),
    (selftest.check_batch, let_attention_hear_the_padding, "nats"),
    (selftest.check_memory, plan_too_little, "MB, plan "),
    (selftest.check_resume, lose_the_optimizer, "largest difference"),
    (selftest.check_fused, fuse_badly, "kept 50.0% of the adapters' margin"),
    (selftest.check_decoding, forget_mamba_s_state, "nats per token"),
]


@pytest.mark.parametrize(("check", "fault", "number"), FAULTS, ids=[f[1].__name__ for f in FAULTS])
def test_each_check_can_fail(
    check: Callable[[Config], str],
    fault: Callable[[Config, pytest.MonkeyPatch], None],
    number: str,
    copy: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the fault, a check's line gives the number; without it the check passes (see above)."""
    fault(copy, monkeypatch)
    assert not run_one(check, copy, monkeypatch, tmp_path / "mark.json")
    line, verdict = capsys.readouterr().out.splitlines()[-2:]
    assert line.startswith("FAIL ") and number in line
    assert verdict.startswith("failed: 1 of 1 checks")


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_the_script_exits_with_the_verdict(
    passed: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also writes the mark where the runner looks for it."""
    marks = []

    def run(mark: Path) -> bool:
        marks.append(mark)
        return passed

    monkeypatch.setattr(selftest, "run", run)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == code
    assert marks == [REPOSITORY / "data/.selftest.json"]
