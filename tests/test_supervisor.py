"""Stages that abort, are stopped, or end by themselves, as real processes under the supervisor."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rings
import yaml
from conftest import REPOSITORY
from dpo_mlx import cli
from dpo_mlx import config as configs
from dpo_mlx.process import aborts, awake, signals, supervisor

SCRIPTS = REPOSITORY / "scripts"

# A stage without MLX. Each of its starts does what the next line of todo.txt says. Under mlx.launch
# it tells rank 0's number and exit code as cli.main does.
FAKE_STAGE = """
import os, pathlib, resource, signal, sys, time

here = pathlib.Path(__file__).parent
rank = int(os.environ.get("MLX_RANK", "0"))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def tell(number):
    if path := os.environ.get("DPO_RANK_0"):
        with open(path, "a") as file:
            print(number, file=file)

def note(name, text):
    with open(here / name, "a") as file:
        file.write(text + "\\n")

def end(code):
    if rank == 0:
        tell(code)
    sys.exit(code)

def received(number, frame):
    note(f"received-{rank}.txt", signal.Signals(number).name)

if rank:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        time.sleep(1)
tell(os.getpid())
starts = here / "starts.txt"
start = len(starts.read_text().split()) if starts.exists() else 0
note("starts.txt", "started")
for word in (here / "todo.txt").read_text().splitlines()[start].split():
    if word == "checkpoint":
        (here / f"run/checkpoints/dpo-{start:06d}").mkdir(parents=True)
    elif word == "rows":
        note("train.samples.jsonl", "{}")
    elif word == "abort":
        os.abort()
    elif word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "wait":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, received)
        note("waiting.txt", "now")
        while not (here / "received-0.txt").exists() and not (here / "go-on").exists():
            time.sleep(0.01)
        time.sleep(0.1)  # for a second signal
    elif word == "stubborn":
        signal.signal(signal.SIGTERM, received)
        note("waiting.txt", "now")
        while True:
            time.sleep(0.01)
    elif word == "frozen":
        signal.signal(signal.SIGTERM, received)
        note("waiting.txt", "now")
        os.kill(os.getpid(), signal.SIGSTOP)
    elif word == "family":
        note("waiting.txt", f"{os.getppid()} {os.getpid()}")
        time.sleep(60)
    elif word == "checks":
        from dpo_mlx.process import signals
        with signals.deferred():
            note("waiting.txt", str(os.getpid()))
            try:
                while True:
                    signals.check()
                    time.sleep(0.01)
            except signals.Interrupted as stop:
                note("ended.txt", str(stop.exit_code))
    else:
        end(int(word))
"""


class Staged:
    """A folder with the fake stage, its config, and records of what it did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "10_train_dpo.py"
        self.script.write_text(FAKE_STAGE)
        self.config = folder / "config.yaml"
        values = {
            "model": "m",
            "run_dir": str(folder / "run"),
            "data": {
                "source": "s.jsonl",
                "train_pairs": str(folder / "train.jsonl"),
                "valid_pairs": str(folder / "valid.jsonl"),
            },
            "train": {"learning_rate": 1e-6},
        }
        self.config.write_text(yaml.safe_dump(values))

    def command(self, todo: list[str]) -> list[str]:
        """That of a supervisor whose stage does what `todo` says."""
        (self.folder / "todo.txt").write_text("\n".join(todo))
        supervise = [sys.executable, "-m", "dpo_mlx.process.supervisor", str(self.script)]
        return [*supervise, "--config", str(self.config)]

    def start(self, todo: list[str], *options: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command(todo), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **{"env": self.environment, **more},
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(SCRIPTS)}

    def run(self, todo: list[str], *options: str) -> tuple[int, str]:
        """(exit code, stderr)."""
        process = self.start(todo, *options)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    @property
    def starts(self) -> int:
        return len(self.lines("starts.txt"))

    def wait_for(self, name: str) -> None:
        give_up = time.monotonic() + 30
        while not self.lines(name):
            assert time.monotonic() < give_up, name
            time.sleep(0.01)


@pytest.fixture
def staged(tmp_path: Path) -> Staged:
    return Staged(tmp_path)


# Aborts -----------------------------------------------------------------------------------------


def test_a_stage_that_aborts_after_progress_is_started_again_to_its_end(staged):
    """SIGABRT after a new checkpoint, SIGKILL after new rows, then success. Each abort gets a line
    with its cause and a remedy.
    """
    code, said = staged.run(["checkpoint abort", "rows killed", "0"])
    assert (code, staged.starts) == (0, 3)
    first, second, seconds = filter(None, said.splitlines())
    assert first.startswith("-- 10_train_dpo.py aborted (exit 134): ") and "(1 of 3)" in first
    assert second.startswith(
        "-- 10_train_dpo.py aborted (exit 137): the system most likely ran out"
    )
    assert "lower data.max_length" in second and "(2 of 3)" in second
    assert seconds.startswith("-- 10_train_dpo.py: ") and seconds.endswith(" s")


def test_a_stage_that_aborts_without_progress_gets_one_more_try(staged):
    """After the same abort twice with nothing new on disk, a third start would end the same way."""
    code, said = staged.run(["abort", "abort", "0"])
    assert (code, staged.starts) == (128 + signal.SIGABRT, 2)
    assert [line for line in said.splitlines() if "no progress" in line and "error: " in line]


@pytest.mark.parametrize(("retries", "starts"), [("0", 1), ("2", 3)])
def test_retries_are_bounded_whatever_progress_there_is(retries, starts, staged):
    """The supervisor gives up after --retries, with the exit code of the last abort."""
    code, said = staged.run(["checkpoint killed"] * 5, "--retries", retries)
    assert (code, staged.starts) == (128 + signal.SIGKILL, starts)
    assert f"Not starting it again (--retries {retries})" in said


@pytest.mark.parametrize("code", [1, 2, 3])
def test_an_ordinary_exit_code_is_handed_on_at_once(code, staged):
    """A user's mistake (1) or a guard's stop (3) would only happen again."""
    assert staged.run([f"checkpoint {code}", "0"])[0] == code
    assert staged.starts == 1


def test_an_exit_code_of_an_abort_is_one(staged):
    """`cli.main` exits with 134 when MLX raises a GPU error instead of aborting."""
    code, said = staged.run([str(aborts.ABORTED), "0"])
    assert (code, staged.starts) == (0, 2)
    assert "aborted (exit 134)" in said


# Signals ----------------------------------------------------------------------------------------

STOPS = [
    (number, send)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for send in (os.kill, os.killpg)
]


@pytest.mark.parametrize(("number", "send"), STOPS, ids=lambda value: getattr(value, "name", None))
def test_a_signal_is_handed_on_and_ends_the_stage_for_good(
    number: signal.Signals, send: Callable[[int, int], None], staged: Staged
) -> None:
    """The signal goes to the supervisor alone, or to the whole terminal as with ^C or a closed
    window. The stage gets it and is not started again, even if it aborts after progress. The exit
    code names the signal.
    """
    process = staged.start(["checkpoint wait abort", "0"])
    staged.wait_for("waiting.txt")
    send(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number, said
    assert "SIGTERM" in staged.lines("received-0.txt")
    assert staged.starts == 1 and "again" not in said


def test_what_nohup_started_goes_on_without_its_terminal(staged):
    """An ignored SIGHUP stays ignored."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = staged.start(["wait 0"], preexec_fn=ignore)
    staged.wait_for("waiting.txt")
    os.killpg(process.pid, signal.SIGHUP)
    (staged.folder / "go-on").touch()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert staged.lines("received-0.txt") == []


def test_a_frozen_stage_can_be_stopped(staged):
    """SIGTERM alone has no effect on a process that was stopped with SIGSTOP."""
    process = staged.start(["frozen 0", "0"])
    staged.wait_for("waiting.txt")
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and staged.lines("received-0.txt") == ["SIGTERM"]


@pytest.mark.parametrize("options", [(), ("--launch=-n 1",)])
def test_the_runner_can_end_a_stage_at_once(options, staged):
    """SIGUSR1 is the runner's second signal. The exit code is the first one's."""
    process = staged.start(["stubborn", "0"], *options)
    staged.wait_for("waiting.txt")
    process.send_signal(signal.SIGTERM)
    staged.wait_for("received-0.txt")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 143 and staged.starts == 1


def test_a_stage_whose_supervisor_was_killed_saves_and_ends(staged):
    """Nobody could stop it any more, and the next start would find the folder in use."""
    (staged.folder / "tmp").mkdir()
    environment = {**staged.environment, "TMPDIR": str(staged.folder / "tmp")}
    process = staged.start(["checks"], env=environment)
    staged.wait_for("waiting.txt")
    assert staged.lines("ended.txt") == []
    process.kill()
    for file in (staged.folder / "tmp").iterdir():  # as the runner does
        file.unlink()
    staged.wait_for("ended.txt")
    assert staged.lines("ended.txt") == ["129"]
    process.wait()


def test_a_stage_whose_runner_was_killed_saves_and_ends(staged):
    """The supervisor finds that its parent is another process."""
    command = shlex.join(staged.command(["checks"]))
    runner = subprocess.Popen(
        ["bash", "-c", f"{command} --runner $$ & wait; true"], env=staged.environment
    )
    staged.wait_for("waiting.txt")
    runner.kill()
    runner.wait()
    staged.wait_for("ended.txt")
    assert staged.lines("ended.txt") == ["143"], "the supervisor's SIGTERM"


def test_a_stage_without_a_supervisor_outlives_its_parent(staged):
    """`nohup python 10_train_dpo.py &`, and the shell is closed."""
    environment = {k: v for k, v in staged.environment.items() if k != signals.SUPERVISOR}
    (staged.folder / "todo.txt").write_text("checks")
    shell = subprocess.Popen(
        ["bash", "-c", f"{shlex.quote(sys.executable)} {shlex.quote(str(staged.script))} & wait"],
        env=environment,
    )
    staged.wait_for("waiting.txt")
    shell.kill()
    shell.wait()
    time.sleep(0.3)
    assert staged.lines("ended.txt") == []
    os.kill(int(staged.lines("waiting.txt")[0]), signal.SIGTERM)
    staged.wait_for("ended.txt")


def test_a_stop_that_takes_long_is_explained_once(monkeypatch, capsys):
    """After some seconds, with what to press."""

    class Slow:
        def stop(self) -> None:
            pass

        kill = stop

        def wait(self, look: Callable[[], None]) -> int:
            look()
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(3):
                look()
            return 143

    before = {n: signal.getsignal(n) for n in (*signals.DEFERRED, signal.SIGUSR1)}
    monkeypatch.setattr(supervisor, "SECONDS_OF_PATIENCE", -1)
    try:
        code = supervisor.Supervisor("10.py", Slow, dict, 3).run()  # type: ignore[arg-type]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    err = capsys.readouterr().err
    assert code == 143 and err.count("\n") == 1 and "press ^C again to stop at once" in err


# mlx.launch -------------------------------------------------------------------------------------


@pytest.fixture
def two() -> str:
    """mlx.launch options for two processes."""
    return f"--launch=-n 2 --starting-port {rings.free_ports(1)[0]}"


def test_rank_0_that_dies_without_a_word_has_aborted(staged, two):
    """mlx.launch does not report how its processes ended. A process number without an exit code is
    an abort.
    """
    code, said = staged.run(["checkpoint killed", "killed", "killed"], two)
    assert (code, staged.starts) == (aborts.LOST, 2)
    assert "one of its processes died" in said and "no progress" in said


def test_rank_0_that_the_launcher_ends_has_lost_a_process(staged):
    """A SIGTERM that no user sent comes from mlx.launch, because another rank has died."""
    code, said = staged.run(["143", "0"], "--launch=-n 1")
    assert (code, staged.starts) == (0, 2)
    assert f"(exit {aborts.LOST})" in said


def test_rank_0_s_exit_code_is_the_stage_s(staged):
    """The code in rank 0's file counts (3), not the process's or the launcher's."""
    assert staged.run(["3"], "--launch=-n 1")[0] == 3
    assert staged.starts == 1


def test_only_rank_0_is_told_of_a_signal(staged, two):
    """Rank 0 ends the others once its work is saved."""
    process = staged.start(["wait 7"], two)
    staged.wait_for("waiting.txt")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert staged.lines("received-0.txt") == ["SIGTERM"]
    assert staged.lines("received-1.txt") == []


def test_a_launcher_that_was_killed_leaves_no_process_behind(staged, two):
    """The stage starts again only when the processes that hold its folder are gone."""
    process = staged.start(["family", "3"], two)
    staged.wait_for("waiting.txt")
    launcher, rank_0 = map(int, staged.lines("waiting.txt"))
    os.kill(launcher, signal.SIGKILL)
    process.communicate(timeout=60)
    assert (process.returncode, staged.starts) == (3, 2)
    with pytest.raises(ProcessLookupError):
        os.kill(rank_0, 0)


@pytest.mark.parametrize("launch", ["-n '2", '"'])
def test_launch_options_that_cannot_be_read_are_one_line(launch, staged):
    """A quote without its partner."""
    code, said = staged.run(["0"], f"--launch={launch}")
    assert code == 1 and staged.starts == 0
    assert said.startswith("error: --launch: ") and len(said.splitlines()) == 1


def test_a_launcher_that_starts_nothing_is_an_ordinary_fault(staged):
    """With options that mlx.launch rejects, the exit code is 1 and there is no retry."""
    code, said = staged.run(["0"], "--launch=--no-such-option")
    assert code == 1 and staged.starts == 0
    assert "again" not in said


def test_processes_on_one_machine_share_its_cores(monkeypatch):
    """BLAS threads: all cores for one process, an equal part for several, at least one."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    threads = {"--hostfile hosts.json": "8", "-n 2": "4", "--repeat-hosts=16": "1"}
    assert {launch: supervisor._blas_threads(launch) for launch in threads} == threads
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert supervisor._blas_threads("-n 2") == "3"


# Progress and plan ------------------------------------------------------------------------------


def test_progress_is_a_new_checkpoint_or_more_rows(staged):
    """Only work that the next start resumes from counts: not metrics after the last checkpoint, and
    not an unfinished folder.
    """
    config = configs.load(staged.config)
    reference = staged.folder / "run/reference/base/train.jsonl"
    reference.parent.mkdir(parents=True)
    reference.write_text("{}\n")
    before = supervisor.kept_work(config)
    assert not supervisor.has_grown(before, before)
    (staged.folder / "run/metrics.jsonl").write_text("{}\n")
    (staged.folder / "run/checkpoints/.dpo-000001.tmp").mkdir(parents=True)
    assert not supervisor.has_grown(before, supervisor.kept_work(config))
    reference.write_text("{}\n{}\n")
    with_rows = supervisor.kept_work(config)
    assert supervisor.has_grown(before, with_rows)
    reference.write_text("")
    assert not supervisor.has_grown(with_rows, supervisor.kept_work(config))
    (staged.folder / "run/checkpoints/dpo-000001").mkdir()
    assert supervisor.has_grown(with_rows, supervisor.kept_work(config))


def test_what_is_left_to_do_is_told_after_a_stage(staged):
    """The sum of the plan's minutes for the stages that follow."""
    minutes = {
        "06_generate_dpo_pairs.py": 5,
        "10_train_dpo.py": 60,
        "11_fuse.py": 2.5,
        "12_a.py": 4,
    }
    (staged.folder / "run").mkdir()
    plan = {"config": configs.digest(configs.load(staged.config)), "minutes": minutes}
    (staged.folder / "run/plan.json").write_text(json.dumps(plan))
    assert staged.run(["0"])[1].splitlines()[-1] == "-- about 6 minutes to go"
    assert "to go" not in staged.run(["0"], "--set", "seed=1")[1], "the plan is another config's"


@pytest.mark.parametrize("text", [None, "", "[]", '{"minutes": 3}', '{"minutes": {"12": null}}'])
def test_without_a_plan_nothing_is_told(text, staged):
    """A missing or half-written plan is no error."""
    config = configs.load(staged.config)
    config.run.path.mkdir()
    if text is not None:
        (config.run.path / "plan.json").write_text(text)
    assert supervisor.minutes_to_go(config, "10_train_dpo.py") is None


def test_the_supervisor_starts_without_mlx():
    """It starts fast and does not hold the GPU."""
    program = (
        "import sys, dpo_mlx.process.supervisor; "
        "print(any(m.startswith('mlx') for m in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    assert subprocess.check_output([sys.executable, "-c", program], env=environment) == b"False\n"


# The GPU's faults, in a stage's own process -----------------------------------------------------

IMPATIENT = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)
FULL = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)


def end_of_stage(error: Exception, config: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of a stage that raises `error`."""

    def stage(config: configs.Config, options: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["10_train_dpo.py", "--config", str(config)])
    with pytest.raises(SystemExit) as stopped:
        cli.main(stage, cli.parser("stage"))
    return stopped.value.code


@pytest.mark.parametrize(("text", "code"), [(IMPATIENT, 134), (FULL, 137)])
def test_a_gpu_s_fault_is_one_line_and_an_abort(text, code, staged, monkeypatch, capsys):
    """MLX 0.32 and later raise this error. The stage exits with the code that the abort used to
    have, so the runner starts it again.
    """
    assert end_of_stage(RuntimeError(text), staged.config, monkeypatch) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {text} Cause: the system" if code == 137 else f"error: {text} Cause: "
    )


def test_another_runtime_error_is_no_abort(staged, monkeypatch, capsys):
    """It would only happen again: the stage exits with 1."""
    assert end_of_stage(RuntimeError("[matmul] shapes"), staged.config, monkeypatch) == 1
    assert "[matmul] shapes" in capsys.readouterr().err


def test_a_mac_s_abort_is_told_with_the_display():
    """On a Mac 134 means the GPU's watchdog; elsewhere it has no known cause."""
    assert "let the display sleep" in aborts.explain(aborts.ABORTED, "darwin")
    assert "display" not in aborts.explain(aborts.ABORTED, "linux")
    assert all("ran out of memory" in aborts.explain(aborts.KILLED, p) for p in ("darwin", "linux"))
    assert all("crashed" in aborts.explain(code, "darwin") for code in aborts.CRASHED)


@pytest.mark.parametrize(("platform", "before", "after"), [
    ("darwin", {}, "1"),
    ("darwin", {"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "0"}, "0"),
    ("linux", {}, "None"),
])  # fmt: skip
def test_the_gpu_s_watchdog_is_relaxed_before_mlx_is_loaded(platform, before, after):
    """Importing the library sets the variable on a Mac, unless the user has set it."""
    program = (
        f"import os, sys; sys.platform = {platform!r}; import dpo_mlx; "
        "print(os.environ.get('AGX_RELAX_CDM_CTXSTORE_TIMEOUT'), 'mlx' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), **before}
    done = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert done == f"{after} False\n"


# Sleep ------------------------------------------------------------------------------------------


def stand_in(folder: Path, name: str, script: str) -> None:
    """A shell script that plays the program `name`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("platform", "by_runner", "kept"), [
    ("darwin", False, True), ("darwin", True, False), ("linux", False, False)
])  # fmt: skip
def test_a_stage_alone_keeps_a_mac_awake(platform, by_runner, kept, tmp_path, monkeypatch, capsys):
    """caffeinate runs as long as the stage's process, and without -d: the display may sleep."""
    stand_in(tmp_path, "caffeinate", f'echo "$@" > {shlex.quote(str(tmp_path))}/new && '
             f"mv {shlex.quote(str(tmp_path))}/new {shlex.quote(str(tmp_path))}/asked")  # fmt: skip
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv(awake.KEPT_AWAKE, raising=False)
    if by_runner:
        monkeypatch.setenv(awake.KEPT_AWAKE, "1")
    awake.keep()
    assert ("the display may sleep" in capsys.readouterr().err) == kept
    if kept:
        give_up = time.monotonic() + 10
        while not (asked := tmp_path / "asked").exists():
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert asked.read_text() == f"-is -w {os.getpid()}\n"


def test_a_mac_without_caffeinate_is_no_fault(tmp_path, monkeypatch, capsys):
    """The stage runs anyway."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(awake.KEPT_AWAKE, raising=False)
    awake.keep()
    assert capsys.readouterr().err == ""
