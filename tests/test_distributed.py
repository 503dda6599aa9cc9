"""Several processes on loopback share the work of a run: the result is the same as with one."""

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
import rings
from conftest import REPOSITORY
from dpo_mlx import config
from dpo_mlx.config import Config
from dpo_mlx.files import jsonl
from dpo_mlx.parallel.channel import LOST_PROCESS
from dpo_mlx.parallel.distributed import shares
from dpo_mlx.process import aborts
from dpo_mlx.scoring.objectives import SFT
from dpo_mlx.stages.make_pairs import make_pairs
from dpo_mlx.stages.train_dpo import train_dpo
from runs import determined

MAKE_PAIRS = "scripts/phase3-prepare-data-mlx/06_generate_dpo_pairs.py"
TRAIN = "scripts/phase4-fine-tune-model/10_train_dpo.py"
# What rank 0 is told by the signal, and the exit code of that.
STOPPED = 128 + signal.SIGTERM


def start(folder: Path, count: int, script: str, *more: str) -> list[subprocess.Popen[str]]:
    """Start the processes of a stage by rank, as mlx.launch does with its ring. Rank 1 stands for
    another machine: it works in another folder.
    """
    started = []
    for rank, ring in enumerate(rings.environments(folder, count)):
        machine = folder if rank == 0 else folder / "elsewhere"
        machine.mkdir(exist_ok=True)
        started.append(
            subprocess.Popen(
                [sys.executable, str(REPOSITORY / script), "--config", "c.yaml", *more],
                cwd=machine,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **ring},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """The exit code, stdout and stderr of each rank."""
    said = [process.communicate(timeout=120) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


def run(folder: Path, count: int, script: str, *more: str) -> str:
    """Run a stage to its end in several processes. Returns its output."""
    (_, said, _), *others = ended = end(start(folder, count, script, *more))
    for code, _, err in ended:
        assert code == 0, err
    assert all(out == "" for _, out, _ in others), "only rank 0 prints"
    return said


def run_alone(folder: Path, stage: Callable[[Config], object]) -> None:
    """Run a stage to its end in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage(config.load(Path("c.yaml")))


def train(config: Config) -> None:
    assert train_dpo(config)


@pytest.fixture
def fresh(settings: dict[str, Any], tmp_path: Path, llama: Path, write_config: Any) -> Any:
    """fresh(name) -> a folder with c.yaml: 7 updates of SFT and 14 of DPO, of at most 4 pairs."""

    def made(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings["model"] = str(llama)
        settings["run_dir"] = "run"
        data = {"train_pairs": "run/pairs/train.jsonl", "valid_pairs": "run/pairs/valid.jsonl"}
        settings["data"] |= {**data, "valid_fraction": 0.3}
        settings["generation"]["batch_size"] = 7
        settings["guard"] = {"enabled": False}
        settings["sft"] = {"epochs": 1, "learning_rate": 1e-3}
        settings["train"] |= {"epochs": 2, "eval_every": 5, "eval_questions": 3, "save_every": 1}
        settings["train"]["replay"] = 2
        settings["train"] |= changes
        (folder / "c.yaml").write_text(write_config(settings).read_text())
        return folder

    return made


def alike(one: Path, other: Path) -> None:
    """Check that updates and evaluations are the same to float tolerance."""
    rows, others = (determined(folder / "run/metrics.jsonl") for folder in (one, other))
    assert len(rows) == len(others)
    for row, expected in zip(rows, others, strict=True):
        assert row.keys() == expected.keys() and row["phase"] == expected["phase"]
        numbers, wanted = ({k: v for k, v in r.items() if k != "phase"} for r in (row, expected))
        # At the reference margins are differences of equal numbers. And AdamW's first step of DPO
        # moves each weight by the whole rate: rounding can turn it where the gradient is near 0.
        limit = 1e-5 if row["phase"] == SFT else 1e-4
        assert numbers == pytest.approx(wanted, rel=limit, abs=limit)


def test_one_two_and_three_processes_learn_the_same(fresh):
    """Pairs, reference, 21 updates and their evaluations: samples agree to the byte, numbers to
    float tolerance. The last update of an epoch has one pair, fewer than there are processes.
    """
    alone, by_two, by_three = (fresh(f"by{count}") for count in (1, 2, 3))
    run_alone(alone, make_pairs)
    run_alone(alone, train)
    updates = [row for row in jsonl.read_whole_lines(alone / "run/metrics.jsonl") if "pairs" in row]
    assert len(updates) == 21 and {row["pairs"] for row in updates} == {4, 1}
    run(by_two, 2, MAKE_PAIRS)
    for name in ("train.jsonl", "valid.jsonl", "train.samples.jsonl"):
        made, expected = (folder / "run/pairs" / name for folder in (by_two, alone))
        assert made.read_bytes() == expected.read_bytes()
    shutil.copytree(by_two / "run/pairs", by_three / "run/pairs")
    (by_three / "run/.lock").touch()
    for count, folder in ((2, by_two), (3, by_three)):
        said = run(folder, count, TRAIN)
        assert f", in each of {count} processes); " in said, "all share this machine's memory"
        alike(folder, alone)
        assert list((folder / "elsewhere").iterdir()) == [], "only rank 0 writes"


def test_a_run_goes_on_with_another_number_of_processes(fresh):
    """SIGTERM in the middle of training, to both of two processes, then to all of three, as ^C
    reaches all: they end, and one process finishes the run as if it had never stopped.
    """
    undisturbed, stopped = fresh("undisturbed"), fresh("stopped")
    for folder in (undisturbed, stopped):
        run_alone(folder, make_pairs)
    run_alone(undisturbed, train)
    for count, update in ((2, 3), (3, 10)):
        processes = start(stopped, count, TRAIN)
        wait_for_update(stopped, update)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [code for code, *_ in end(processes)] == [STOPPED] + [0] * (count - 1)
    run_alone(stopped, train)
    alike(stopped, undisturbed)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_other_says_so_and_the_run_goes_on(victim, fresh):
    """SIGKILL to either of two processes: the other ends with one line that says what to do."""
    folder = fresh("killed")
    run_alone(folder, make_pairs)
    processes = start(folder, 2, TRAIN)
    wait_for_update(folder, 2)
    processes[victim].kill()
    code, _, err = end(processes)[1 - victim]
    assert code == aborts.LOST
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert LOST_PROCESS in line
    kept = determined(folder / "run/metrics.jsonl")[:-1]  # the last update may not be saved
    run_alone(folder, train)
    assert determined(folder / "run/metrics.jsonl")[: len(kept)] == kept


def test_another_machine_with_another_model_is_refused(fresh, llama, granite):
    """Rank 1 has another model under the same name: one line, and no file is written."""
    folder = fresh("models")
    (folder / "elsewhere").mkdir()
    (folder / "base").symlink_to(llama)
    (folder / "elsewhere/base").symlink_to(granite)
    (code, _, err), _ = end(start(folder, 2, MAKE_PAIRS, "--set", "model=base"))
    assert code == 1
    assert err.splitlines()[-1] == (
        "error: model: rank 1 has other files under base than rank 0; put the same model folder on "
        "every machine"
    )
    assert not (folder / "run/pairs").exists()


def wait_for_update(folder: Path, number: int) -> None:
    """Wait until a run has made this update."""
    metrics, give_up = folder / "run/metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and f'"iteration": {number},' in metrics.read_text()):
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_shares_by_hand():
    """The costliest item goes first, to the process with the least work. Items stay in order, and a
    process may get none.
    """
    assert shares([5, 1, 4, 3], 2) == [[0, 1], [2, 3]]
    assert shares([1, 1], 3) == [[0], [1], []]
    assert shares([2, 9], 1) == [[0, 1]]
