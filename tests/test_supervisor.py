"""The supervisor with real processes: stages that abort, that a signal stops, or that just end."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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

# A stage without MLX. Each start follows the next line of todo.txt. Under mlx.launch, rank 0
# reports its process number and exit code as cli.main does.
FAKE_STAGE = """
import os, pathlib, resource, signal, sys, time

here = pathlib.Path(__file__).parent
rank = int(os.environ.get("MLX_RANK", "0"))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def report(number):
    if path := os.environ.get("DPO_RANK_0"):
        with open(path, "a") as file:
            print(number, file=file)

def append_line(name, text):
    with open(here / name, "a") as file:
        file.write(text + "\\n")

def end(code):
    if rank == 0:
        report(code)
    sys.exit(code)

def received(number, frame):
    append_line(f"received-{rank}.txt", signal.Signals(number).name)

if rank:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        time.sleep(1)
report(os.getpid())
starts = here / "starts.txt"
start = len(starts.read_text().split()) if starts.exists() else 0
append_line("starts.txt", "started")
for word in (here / "todo.txt").read_text().splitlines()[start].split():
    if word == "checkpoint":
        (here / f"run/checkpoints/dpo-{start:06d}").mkdir(parents=True)
    elif word == "rows":
        append_line("train.samples.jsonl", "{}")
    elif word == "abort":
        os.abort()
    elif word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "wait":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, received)
        append_line("waiting.txt", "now")
        while not (here / "received-0.txt").exists() and not (here / "go-on").exists():
            time.sleep(0.01)
        time.sleep(0.1)  # for a second signal
    elif word == "stubborn":
        signal.signal(signal.SIGTERM, received)
        append_line("waiting.txt", "now")
        while True:
            time.sleep(0.01)
    elif word == "frozen":
        signal.signal(signal.SIGTERM, received)
        append_line("waiting.txt", "now")
        os.kill(os.getpid(), signal.SIGSTOP)
    elif word == "family":
        append_line("waiting.txt", f"{os.getppid()} {os.getpid()}")
        time.sleep(60)
    elif word == "checks":
        from dpo_mlx.process import signals
        with signals.deferred():
            append_line("waiting.txt", str(os.getpid()))
            try:
                while True:
                    signals.check()
                    time.sleep(0.01)
            except signals.Interrupted as stop:
                append_line("ended.txt", str(stop.exit_code))
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
        """Return the command of a supervisor whose stage follows `todo`."""
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
        """Return the exit code and stderr."""
        process = self.start(todo, *options)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    @property
    def starts(self) -> int:
        return len(self.lines("starts.txt"))

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not self.lines(name):
            assert time.monotonic() < deadline, name
            time.sleep(0.01)


@pytest.fixture
def staged(tmp_path: Path) -> Staged:
    return Staged(tmp_path)


# Aborts -----------------------------------------------------------------------------------------


def test_a_stage_that_aborts_after_progress_is_restarted_until_it_ends(staged):
    """It gets SIGABRT after a new checkpoint, SIGKILL after new rows, and then succeeds. For each
    abort the supervisor prints the cause and a remedy.
    """
    code, err = staged.run(["checkpoint abort", "rows killed", "0"])
    assert (code, staged.starts) == (0, 3)
    first, second, seconds = filter(None, err.splitlines())
    assert first.startswith("-- 10_train_dpo.py aborted (exit 134): ") and "(1 of 3)" in first
    assert second.startswith(
        "-- 10_train_dpo.py aborted (exit 137): the system most likely ran out"
    )
    assert "lower data.max_length" in second and "(2 of 3)" in second
    assert seconds.startswith("-- 10_train_dpo.py: ") and seconds.endswith(" s")


def test_a_stage_that_aborts_without_progress_gets_one_more_try(staged):
    """After two aborts with nothing new on disk, a third start would end the same way."""
    code, err = staged.run(["abort", "abort", "0"])
    assert (code, staged.starts) == (128 + signal.SIGABRT, 2)
    assert [line for line in err.splitlines() if "no progress" in line and "error: " in line]


@pytest.mark.parametrize(("retries", "starts"), [("0", 1), ("2", 3)])
def test_progress_does_not_raise_the_number_of_retries(retries, starts, staged):
    """The supervisor gives up after --retries, with the exit code of the last abort."""
    code, err = staged.run(["checkpoint killed"] * 5, "--retries", retries)
    assert (code, staged.starts) == (128 + signal.SIGKILL, starts)
    assert f"Not starting it again (--retries {retries})" in err


@pytest.mark.parametrize("code", [1, 2, 3])
def test_other_exit_codes_are_not_retried(code, staged):
    """A user's mistake (1) or a stop by a guard (3) would only happen again."""
    assert staged.run([f"checkpoint {code}", "0"])[0] == code
    assert staged.starts == 1


def test_the_exit_code_of_an_abort_counts_as_an_abort(staged):
    """`cli.main` exits with 134 when MLX raises a GPU error instead of aborting."""
    code, err = staged.run([str(aborts.ABORTED), "0"])
    assert (code, staged.starts) == (0, 2)
    assert "aborted (exit 134)" in err


# Signals ----------------------------------------------------------------------------------------

STOPS = [
    (number, send)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for send in (os.kill, os.killpg)
]


@pytest.mark.parametrize(("number", "send"), STOPS, ids=lambda value: getattr(value, "name", None))
def test_a_signal_stops_the_stage_for_good(
    number: signal.Signals, send: Callable[[int, int], None], staged: Staged
) -> None:
    """The signal goes to the supervisor alone, or to the whole process group as with ^C or a closed
    window. The stage gets SIGTERM and is not restarted, even if it aborts after progress. The exit
    code names the first signal.
    """
    process = staged.start(["checkpoint wait abort", "0"])
    staged.wait_for("waiting.txt")
    send(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert "SIGTERM" in staged.lines("received-0.txt")
    assert staged.starts == 1 and "again" not in err


def test_a_stage_under_nohup_outlives_its_terminal(staged):
    """nohup ignores SIGHUP, and so does the supervisor then."""

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
    """The runner sends SIGUSR1 for a second ^C. The exit code is the first signal's."""
    process = staged.start(["stubborn", "0"], *options)
    staged.wait_for("waiting.txt")
    process.send_signal(signal.SIGTERM)
    staged.wait_for("received-0.txt")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 143 and staged.starts == 1


def test_a_stage_whose_supervisor_was_killed_saves_and_ends(staged):
    """Nobody could stop it, and the next run would find the folder in use."""
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
    """The supervisor notices that it has another parent process."""
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
    """The user starts `nohup python 10_train_dpo.py &` and closes the shell."""
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


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The supervisor's clock, for tests that run the supervisor in their own process."""
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", clock)
    handlers = {n: signal.getsignal(n) for n in (*signals.DEFERRED, signal.SIGUSR1)}
    yield clock
    for number, handler in handlers.items():
        signal.signal(number, handler)


class SlowStage:
    """Gets the signals that `moments` list, with their seconds, and ends after a minute."""

    def __init__(self, clock: Clock, moments: list[tuple[float, signal.Signals]]) -> None:
        self._clock, self._moments = clock, moments
        self.requests: list[str] = []

    def stop(self) -> None:
        self.requests.append("stop")

    def kill(self) -> None:
        self.requests.append("kill")

    def wait(self, every_second: Callable[[], None]) -> int:
        for seconds, number in self._moments:
            self._clock.now = seconds
            signal.raise_signal(number)
        for _ in range(60):
            every_second()
            self._clock.now += 1
        return 143

    def run(self, runner: int | None) -> int:
        """Return the supervisor's exit code."""
        start: Any = lambda: self  # noqa: E731
        return supervisor.Supervisor("10.py", start, dict, 3, runner).run()


TERM, HUP, INT, USR1 = signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(("moments", "requests", "code"), [
    ([(0, TERM), (0.5, TERM)], ["stop"], 143),
    ([(0, HUP), (2, HUP), (2, TERM)], ["stop"], 129),
    ([(0, TERM), (4, TERM)], ["stop", "kill"], 143),
    ([(0, HUP), (4, TERM)], ["stop", "kill"], 129),
    ([(0, USR1), (0.1, USR1)], ["stop", "kill"], 130),
    ([(0, TERM), (0.1, USR1)], ["stop", "kill"], 143),
    ([(0, INT), (0, USR1), (9, INT)], ["stop"], 130),
])  # fmt: skip
def test_a_second_signal_ends_the_stage_unless_it_repeats_the_first(moments, requests, code, clock):
    """SIGTERM and SIGHUP come twice at once from `timeout`, a closed window, and a runner that
    passes them on. ^C comes from the runner as SIGUSR1; the terminal's own SIGINT does not count.
    """
    stage = SlowStage(clock, moments)
    assert stage.run(runner=os.getppid()) == code
    assert stage.requests == requests


def test_without_a_runner_the_terminal_sends_interrupts(clock):
    """The second ^C ends the stage."""
    stage = SlowStage(clock, [(0, INT), (0.1, INT)])
    assert stage.run(runner=None) == 130
    assert stage.requests == ["stop", "kill"]


def test_a_stage_whose_runner_is_gone_has_time_to_save(clock):
    """The supervisor notices it every second, but asks only once."""
    stage = SlowStage(clock, [])
    assert stage.run(runner=os.getpid()) == 129  # no process is its own parent
    assert stage.requests == ["stop"]


def test_a_slow_stop_is_explained_once(clock, capsys):
    """After some seconds the supervisor says which key ends the stage."""
    assert SlowStage(clock, [(0, TERM)]).run(runner=None) == 143
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "press ^C again to stop at once" in err


# mlx.launch -------------------------------------------------------------------------------------


@pytest.fixture
def two() -> str:
    """mlx.launch options for two processes."""
    return f"--launch=-n 2 --starting-port {rings.free_ports(1)[0]}"


def test_rank_0_that_dies_without_an_exit_code_has_aborted(staged, two):
    """mlx.launch does not report how its processes ended, so the missing exit code must tell."""
    code, err = staged.run(["checkpoint killed", "killed", "killed"], two)
    assert (code, staged.starts) == (aborts.LOST, 2)
    assert "one of its processes died" in err and "no progress" in err


def test_a_sigterm_from_the_launcher_means_that_a_process_died(staged):
    """mlx.launch sends SIGTERM to rank 0 when another rank has died."""
    code, err = staged.run(["143", "0"], "--launch=-n 1")
    assert (code, staged.starts) == (0, 2)
    assert f"(exit {aborts.LOST})" in err


def test_rank_0_s_exit_code_is_the_stage_s(staged):
    """The code in rank 0's file counts (3), not the process's or the launcher's."""
    assert staged.run(["3"], "--launch=-n 1")[0] == 3
    assert staged.starts == 1


@pytest.mark.parametrize(("report", "launcher_code", "stop_requested", "code"), [
    ([], 1, False, 1),  # mlx.launch rejected its options
    ([], -signal.SIGKILL, False, aborts.LOST),
    ([4711], 0, True, aborts.LOST),
    ([4711, 0], 1, False, 0),
    ([4711, 3], 0, False, 3),
    ([4711, 143], 0, True, 143),
    ([4711, 143], 0, False, aborts.LOST),  # another rank died
])  # fmt: skip
def test_the_exit_code_of_several_processes(report, launcher_code, stop_requested, code):
    """Rank 0's code, or LOST when a process died and a restart can help."""
    assert supervisor.launched_exit_code(report, launcher_code, stop_requested) == code


def test_only_rank_0_gets_a_signal(staged, two):
    """Rank 0 ends the other processes after it has saved its work."""
    process = staged.start(["wait 7"], two)
    staged.wait_for("waiting.txt")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert staged.lines("received-0.txt") == ["SIGTERM"]
    assert staged.lines("received-1.txt") == []


def test_a_killed_launcher_leaves_no_process_behind(staged, two):
    """Before a restart, the processes that hold the run's folder must be gone."""
    process = staged.start(["family", "3"], two)
    staged.wait_for("waiting.txt")
    launcher, rank_0 = map(int, staged.lines("waiting.txt"))
    os.kill(launcher, signal.SIGKILL)
    process.communicate(timeout=60)
    assert (process.returncode, staged.starts) == (3, 2)
    with pytest.raises(ProcessLookupError):
        os.kill(rank_0, 0)


@pytest.mark.parametrize("launch", ["-n '2", '"'])
def test_launch_options_with_an_open_quote_are_refused(launch, staged):
    """The error is one line."""
    code, err = staged.run(["0"], f"--launch={launch}")
    assert code == 1 and staged.starts == 0
    assert err.startswith("error: --launch: ") and len(err.splitlines()) == 1


def test_options_that_the_launcher_rejects_are_not_retried(staged):
    """The exit code is 1."""
    code, err = staged.run(["0"], "--launch=--no-such-option")
    assert code == 1 and staged.starts == 0
    assert "again" not in err


@pytest.mark.parametrize(("options", "threads"), [
    ("", "8"),
    ("--hostfile hosts-n4.json", "8"),
    ("-n 2", "4"),
    ("-n3 --verbose", "2"),
    ("--repeat-hosts=16", "1"),
    ("-n", "8"),  # mlx.launch reports these two
    ("-n many", "8"),
])  # fmt: skip
def test_processes_on_one_machine_share_its_cores(options, threads, monkeypatch):
    """Each gets the same number of BLAS threads, and at least one."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert supervisor.blas_threads(options.split()) == threads


def test_the_user_s_number_of_blas_threads_stands(monkeypatch):
    """The environment variable OPENBLAS_NUM_THREADS has the last word."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert supervisor.blas_threads(["-n", "2"]) == "3"


@pytest.mark.parametrize(("script", "launch", "cpu", "start"), [
    ("06_generate_dpo_pairs.py", "auto", True, "-n 2 --starting-port "),
    ("10_train_dpo.py", "auto", True, "-n 2 --starting-port "),
    ("10_train_dpo.py", "auto", False, "one process"),
    ("10_train_dpo.py", "none", True, "one process"),
    ("10_train_dpo.py", "--hostfile 'my hosts'", False, "--hostfile my hosts"),
    ("05_fetch_demo_model.py", "auto", True, "one process"),
    ("11_fuse_adapters.py", "-n 2", True, "one process"),
])  # fmt: skip
def test_stages_06_and_10_can_use_several_processes(script, launch, cpu, start, monkeypatch):
    """By default they use two on a CPU. The other stages always use one."""
    monkeypatch.setattr(supervisor, "has_cpu_for_two", lambda: cpu)
    monkeypatch.setattr(supervisor, "SingleProcess", lambda command: "one process")
    monkeypatch.setattr(supervisor, "LaunchedProcesses", lambda _, options: " ".join(options))
    command = ["python", f"scripts/{script}"]
    assert str(supervisor.starter(command, launch)()).startswith(start)


def test_a_restart_uses_another_port(monkeypatch):
    """The port of the first start may be the reason why it failed."""
    monkeypatch.setattr(supervisor, "has_cpu_for_two", lambda: True)
    monkeypatch.setattr(supervisor, "LaunchedProcesses", lambda _, options: options[-1])
    start = supervisor.starter(["python", "10_train_dpo.py"], "auto")
    ports = {int(str(start())) for _ in range(9)}
    assert len(ports) > 1 and ports <= set(range(20000, 30000))


# Progress and plan ------------------------------------------------------------------------------


def test_progress_is_a_new_checkpoint_or_more_rows(staged):
    """Metrics after the last checkpoint are no progress, nor is an incomplete checkpoint: the next
    start does not resume from them.
    """
    config = configs.load(staged.config)
    reference = staged.folder / "run/reference/base/train.jsonl"
    reference.parent.mkdir(parents=True)
    reference.write_text("{}\n")
    before = supervisor.resumable_work(config)
    assert not supervisor.has_progress(before, before)
    (staged.folder / "run/metrics.jsonl").write_text("{}\n")
    (staged.folder / "run/checkpoints/.dpo-000001.tmp").mkdir(parents=True)
    assert not supervisor.has_progress(before, supervisor.resumable_work(config))
    reference.write_text("{}\n{}\n")
    with_rows = supervisor.resumable_work(config)
    assert supervisor.has_progress(before, with_rows)
    reference.write_text("")
    assert not supervisor.has_progress(with_rows, supervisor.resumable_work(config))
    (staged.folder / "run/checkpoints/dpo-000001").mkdir()
    assert supervisor.has_progress(with_rows, supervisor.resumable_work(config))


def test_the_minutes_to_go_follow_a_stage(staged):
    """They are the plan's minutes of all later stages."""
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
def test_without_a_plan_there_are_no_minutes_to_go(text, staged):
    """A missing or incomplete plan is no error."""
    config = configs.load(staged.config)
    config.run.path.mkdir()
    if text is not None:
        (config.run.path / "plan.json").write_text(text)
    assert supervisor.minutes_to_go(config, "10_train_dpo.py") is None


def test_the_supervisor_starts_without_mlx():
    """So it starts fast and does not use the GPU."""
    program = (
        "import sys, dpo_mlx.process.supervisor; "
        "print(any(m.startswith('mlx') for m in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    assert subprocess.check_output([sys.executable, "-c", program], env=environment) == b"False\n"


# GPU errors in a stage's process ----------------------------------------------------------------

INTERACTIVITY = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)
OUT_OF_MEMORY = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)


def exit_code_after(error: Exception, config: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the exit code of a stage that raises `error`."""

    def stage(config: configs.Config, options: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["10_train_dpo.py", "--config", str(config)])
    with pytest.raises(SystemExit) as exit:
        cli.main(stage, cli.parser("stage"))
    return exit.value.code


@pytest.mark.parametrize(("text", "code"), [(INTERACTIVITY, 134), (OUT_OF_MEMORY, 137)])
def test_a_gpu_error_is_one_line_and_an_abort(text, code, staged, monkeypatch, capsys):
    """MLX 0.32 and later raise this error where earlier versions aborted. The stage exits with the
    code of the abort, so the supervisor restarts it.
    """
    assert exit_code_after(RuntimeError(text), staged.config, monkeypatch) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {text} Cause: the system" if code == 137 else f"error: {text} Cause: "
    )


def test_another_runtime_error_is_no_abort(staged, monkeypatch, capsys):
    """It would only happen again, so the stage exits with 1."""
    assert exit_code_after(RuntimeError("[matmul] shapes"), staged.config, monkeypatch) == 1
    assert "[matmul] shapes" in capsys.readouterr().err


def test_after_an_abort_on_a_mac_the_remedy_is_the_display():
    """On a Mac, 134 means the GPU's watchdog. Elsewhere it has no known cause."""
    assert "let the display sleep" in aborts.explain(aborts.ABORTED, "darwin")
    assert "display" not in aborts.explain(aborts.ABORTED, "linux")
    assert all("ran out of memory" in aborts.explain(aborts.KILLED, p) for p in ("darwin", "linux"))
    assert all("crashed" in aborts.explain(code, "darwin") for code in aborts.CRASHED)


@pytest.mark.parametrize(("platform", "before", "after"), [
    ("darwin", {}, "1"),
    ("darwin", {"AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "0"}, "0"),
    ("linux", {}, "None"),
])  # fmt: skip
def test_the_gpu_watchdog_is_relaxed_before_mlx_is_imported(platform, before, after):
    """Importing the library sets the variable on a Mac, unless the user has set it."""
    program = (
        f"import os, sys; sys.platform = {platform!r}; import dpo_mlx; "
        "print(os.environ.get('AGX_RELAX_CDM_CTXSTORE_TIMEOUT'), 'mlx' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), **before}
    done = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert done == f"{after} False\n"


# Sleep ------------------------------------------------------------------------------------------


def fake_program(folder: Path, name: str, script: str) -> None:
    """Put a shell script called `name` into `folder`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("platform", "has_runner", "caffeinate"), [
    ("darwin", False, True), ("darwin", True, False), ("linux", False, False)
])  # fmt: skip
def test_a_stage_without_a_runner_keeps_a_mac_awake(
    platform, has_runner, caffeinate, tmp_path, monkeypatch, capsys
):
    """caffeinate runs as long as the stage, and without -d, so that the display may sleep."""
    arguments = tmp_path / "arguments"
    arguments.touch()
    fake_program(tmp_path, "caffeinate", f'echo "$@" > {shlex.quote(str(arguments))}')
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv(awake.KEPT_AWAKE, raising=False)
    if has_runner:
        monkeypatch.setenv(awake.KEPT_AWAKE, "1")
    awake.keep()
    assert ("the display may sleep" in capsys.readouterr().err) == caffeinate
    if caffeinate:
        deadline = time.monotonic() + 10
        while not arguments.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert arguments.read_text() == f"-is -w {os.getpid()}\n"


def test_a_stage_runs_on_a_mac_without_caffeinate(tmp_path, monkeypatch, capsys):
    """It prints nothing about it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(awake.KEPT_AWAKE, raising=False)
    awake.keep()
    assert capsys.readouterr().err == ""
