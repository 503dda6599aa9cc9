"""tests/chaos/run.py in short: the chain as a crash leaves it at many moments, and signals to real
processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos import run as chaos
from conftest import REPOSITORY
from dpo_mlx import config
from dpo_mlx.files import atomic, lock, ownership
from dpo_mlx.files.run_folder import LOCK, RunFolder
from dpo_mlx.stages.evaluate import evaluate
from dpo_mlx.stages.fuse_adapters import fuse_adapters
from dpo_mlx.stages.make_pairs import make_pairs
from dpo_mlx.stages.train_dpo import train_dpo
from runs import crossed_limits_of, determined

TRAIN = REPOSITORY / "scripts/phase4-fine-tune-model/10_train_dpo.py"
MOMENTS = 5


def run_chain(folder: Path) -> None:
    """All stages in this process, in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = config.load(Path("c.yaml"))
        make_pairs(loaded)
        assert train_dpo(loaded)
        fuse_adapters(loaded)
        evaluate(loaded)
        assert crossed_limits_of(loaded) == []


def watched(patch: pytest.MonkeyPatch, before_each: Callable[[], None]) -> None:
    """Calls `before_each` before every moment at which the disk changes for good."""

    def watch(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(argument: Any) -> None:
            before_each()
            original(argument)

        return call

    patch.setattr(atomic, "sync_file", watch(atomic.sync_file))
    patch.setattr(ownership, "_delete", watch(ownership._delete))


def test_from_every_moment_on_the_chain_ends_in_the_same_bytes(tmp_path, llama, monkeypatch):
    """The folder is copied as it is before every so manieth sync and removal: what a kill would
    leave then. From each copy on all stages are run, and every file is that of the undisturbed run.
    """
    calm = chaos.make_round(tmp_path / "calm", llama)
    count = 0

    def number() -> None:
        nonlocal count
        count += 1

    with monkeypatch.context() as patch:
        watched(patch, number)
        run_chain(calm)
    total, count = count, 0
    copied = chaos.make_round(tmp_path / "copied", llama)
    step = total // MOMENTS

    def copy() -> None:
        nonlocal count
        if count % step == step // 2:
            shutil.copytree(copied, tmp_path / f"moment{count}")
        count += 1

    with monkeypatch.context() as patch:
        watched(patch, copy)
        run_chain(copied)
    chaos.compare(copied, calm)
    moments = sorted(tmp_path.glob("moment*"))
    assert len(moments) >= MOMENTS
    for moment in moments:
        run_chain(moment)
        assert chaos.compare(moment, calm) > 20


def test_sigterm_to_the_runner_ends_its_stage_which_goes_on_later(tmp_path, settings, write_config):
    """SIGTERM to the shell script while stage 06 samples: the stage finishes its batch and both
    exit, the script with 143; nothing that is there is sampled again.
    """
    settings["generation"] = {"max_tokens": 150, "batch_size": 2}
    settings["data"]["max_length"] = 512
    path = write_config(settings)
    samples = tmp_path / "run/pairs/train.samples.jsonl"
    with subprocess.Popen(
        [str(REPOSITORY / "train_dpo_run1.sh"), str(path)],
        env={**os.environ, "VIRTUAL_ENV": sys.prefix},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as runner:
        while runner.poll() is None and not (samples.exists() and samples.stat().st_size):
            time.sleep(0.01)
        runner.send_signal(signal.SIGTERM)
        _, said = runner.communicate()
    assert runner.returncode == 143, said
    assert "stopped; run the same command again to resume" in said
    with lock.hold_run(RunFolder(tmp_path / "run")):
        kept = samples.read_bytes()
    assert 0 < kept.count(b"\n") < 15 and kept.endswith(b"\n")
    make_pairs(config.load(path))
    assert samples.read_bytes().startswith(kept) and samples.read_bytes().count(b"\n") == 15


def test_training_that_the_system_kills_is_started_again_to_the_same_end(tmp_path, llama):
    """SIGKILL to stage 10 after a checkpoint, as when memory runs out: the supervisor starts it
    again from there, and its rows equal an undisturbed run's.
    """
    calm, killed = (chaos.make_round(tmp_path / name, llama) for name in ("calm", "killed"))
    for folder in (calm, killed):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            make_pairs(config.load(Path("c.yaml")))
            if folder == calm:
                assert train_dpo(config.load(Path("c.yaml")))
    with subprocess.Popen(
        [sys.executable, "-m", "dpo_mlx.process.supervisor", str(TRAIN), "--config", "c.yaml"],
        cwd=killed,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as supervisor:
        while supervisor.poll() is None and not [*killed.glob("run/checkpoints/sft-*")]:
            time.sleep(0.01)
        holder = (killed / "run" / LOCK).read_text().removeprefix(lock.HEADER)
        os.kill(int(holder.split()[1]), signal.SIGKILL)  # "process 123 on ..."
        _, said = supervisor.communicate()
    assert supervisor.returncode == 0, said
    assert said.count("Starting it again from where it was") == 1
    assert determined(killed / "run/metrics.jsonl") == determined(calm / "run/metrics.jsonl")
