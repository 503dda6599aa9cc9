"""Run one stage, pass signals on to it, and restart it when it aborts.

    python -m dpo_mlx.process.supervisor SCRIPT [--config FILE] [--set section.key=value ...]
        [--launch none|auto|OPTIONS] [--retries N] [--runner PROCESS]

The runner starts every stage this way. The exit code is the stage's; it is 130, 143 or 129 after
^C, SIGTERM or SIGHUP, and one of aborts.CODES when the stage aborted too often.

The first signal asks the stage to save and end; a second one ends it at once. The runner sends
SIGUSR1 for ^C. When the runner dies, the supervisor acts as after SIGHUP.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .. import config as configs
from ..config import Config
from ..files.errors import UserError
from . import aborts, last_resort
from .signals import SUPERVISOR

# mlx.launch does not report exit codes. `cli.main` appends rank 0's process number, and later its
# exit code, to the file that this variable names.
RANK_0 = "DPO_RANK_0"
# The value of --launch, for `--check`: it plans for the processes that the runner would start.
LAUNCH = "DPO_LAUNCH"

STAGES_FOR_SEVERAL_PROCESSES = "06_generate_dpo_pairs.py", "10_train_dpo.py"
FIRST_LONG_STAGE = "06"  # the minutes to go are printed from here on
STOPPED_BY_GUARD = 3  # stage 10's exit code; the chain goes on

# The supervisor checks on its runner this often, and types a newline for mlx.launch.
SECONDS_BETWEEN_CHECKS = 1
# `timeout`, a closed window and a runner that passes a signal on all repeat a signal at once. That
# is one request, even on a machine that is slow because it swaps memory.
SECONDS_OF_ONE_REQUEST = 3
SECONDS_OF_PATIENCE = 10  # from the first signal to the line that offers a second one
SECONDS_TO_DIE = 10  # for processes that got SIGKILL


class SingleProcess:
    """A stage in one process."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "LD_PRELOAD": _preload()}
        self._process = subprocess.Popen(
            command, env=environment, preexec_fn=_ignore_terminal_signals
        )

    def stop(self) -> None:
        """Ask the stage to save and end, even if SIGSTOP has frozen it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the stage at once."""
        self._process.kill()

    def wait(self, every_second: Callable[[], None]) -> int:
        """Return the exit code as a shell reports it. Call `every_second` until the stage ends."""
        while _is_running(self._process):
            every_second()
        code = self._process.returncode
        return code if code >= 0 else 128 - code


class LaunchedProcesses:
    """A stage in several processes, which mlx.launch starts. Rank 0 speaks for all of them.

    The processes on this machine form a process group without the supervisor.
    """

    def __init__(self, command: list[str], options: list[str]) -> None:
        self._stop_requested = self._stop_pending = False
        descriptor, name = tempfile.mkstemp(prefix="rank-0-")
        os.close(descriptor)
        self._report_file = Path(name)
        variables = {
            RANK_0: name,
            "LD_PRELOAD": _preload(),
            "OPENBLAS_NUM_THREADS": blas_threads(options),
        }
        env_options = [part for pair in variables.items() for part in ("--env", "=".join(pair))]
        self._launcher = subprocess.Popen(
            ["mlx.launch", *options, *env_options, "--", *command],
            stdin=subprocess.PIPE,
            bufsize=0,
            preexec_fn=_ignore_terminal_signals,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Ask rank 0, as soon as it has started, to save and end. It then ends the other processes.

        Processes that SIGSTOP has frozen go on, so that they can end.
        """
        self._stop_requested = self._stop_pending = True
        if report := self._rank_0_report():
            with suppress(ProcessLookupError):
                os.kill(report[0], signal.SIGTERM)
            self._signal_group(signal.SIGCONT)
            self._stop_pending = False

    def kill(self) -> None:
        """End all processes at once."""
        self._signal_group(signal.SIGKILL)

    def wait(self, every_second: Callable[[], None]) -> int:
        """Return the stage's exit code. Call `every_second` until the stage ends.

        If mlx.launch itself was killed, its processes are still running and hold the run's folder,
        so they are killed too.
        """
        while _is_running(self._launcher):
            every_second()
            if self._stop_pending:
                self.stop()
            self._type_newline()
        self._kill_group()
        report = self._rank_0_report()
        self._report_file.unlink(missing_ok=True)
        return launched_exit_code(report, self._launcher.returncode, self._stop_requested)

    def _kill_group(self) -> None:
        """Kill the processes that outlived mlx.launch, and wait until they are gone."""
        deadline = time.monotonic() + SECONDS_TO_DIE
        while self._signal_group(signal.SIGKILL) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _signal_group(self, number: signal.Signals) -> bool:
        """Send a signal to the process group. Return whether any process was left to receive it."""
        try:
            os.killpg(self._launcher.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS refuses when all of them have ended
            return False
        return True

    def _type_newline(self) -> None:
        """Calm mlx.launch's threads, which spin until every process has refused some input."""
        assert self._launcher.stdin is not None
        with suppress(BrokenPipeError):
            self._launcher.stdin.write(b"\n")

    def _rank_0_report(self) -> list[int]:
        """Return rank 0's process number and exit code, as far as rank 0 has written them."""
        if not self._report_file.exists():  # the signal came after the stage's end
            return []
        return [int(word) for word in self._report_file.read_text().split()]


def launched_exit_code(report: list[int], launcher_code: int, stop_requested: bool) -> int:
    """Return the exit code of a stage that mlx.launch ran: rank 0's, or LOST if a process died.

    `report` holds rank 0's process number and exit code. It is empty if rank 0 never started, and
    has no exit code if rank 0 died. When any process dies, mlx.launch sends SIGTERM to the others.
    """
    if not report:
        return 1 if launcher_code >= 0 else aborts.LOST
    if len(report) == 1:
        return aborts.LOST
    code = report[1]
    return aborts.LOST if code == 128 + signal.SIGTERM and not stop_requested else code


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Return whether the process is still running a second from now."""
    try:
        process.wait(SECONDS_BETWEEN_CHECKS)
    except subprocess.TimeoutExpired:
        return True
    return False


class Supervisor:
    """Runs a stage until it ends, a signal stops it, or it has aborted too often.

    `name` is the script's name. `start` starts the stage. `resumable_work` lists the files that a
    restart resumes from. `runner` is the runner's process number, if there is a runner.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], SingleProcess | LaunchedProcesses],
        resumable_work: Callable[[], dict[Path, int]],
        retries: int,
        runner: int | None = None,
    ) -> None:
        self._name, self._start, self._resumable_work = name, start, resumable_work
        self._retries, self._runner = retries, runner
        self._stage: SingleProcess | LaunchedProcesses | None = None
        self._first_signal: signal.Signals | None = None
        self._first_signal_at = 0.0
        self._kill_requested = False
        self._offer_kill_at = math.inf

    def run(self) -> int:
        """Return the stage's exit code, or 128 + the number of the first signal."""
        self._handle_signals()
        start = time.monotonic()
        code = self._run_with_retries()
        if self._first_signal is not None:
            return 128 + self._first_signal
        _say(f"-- {self._name}: {time.monotonic() - start:.0f} s")
        return code

    def _handle_signals(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signal.SIGHUP, self._on_signal)
        # The terminal sends ^C to the runner and to the supervisor. Only one of them may count it.
        passed_on = self._runner is not None
        signal.signal(signal.SIGINT, signal.SIG_IGN if passed_on else self._on_signal)

    def _run_with_retries(self) -> int:
        retry = 0
        while True:
            work = self._resumable_work()
            code = self._run_once()
            if self._first_signal is not None or code not in aborts.CODES:
                return code
            _say("")  # the stage may have left a progress bar
            fault = f"{self._name} aborted (exit {code}): {aborts.explain(code)}"
            retry += 1
            if retry > self._retries:
                _say(f"error: {fault}. Not starting it again (--retries {self._retries})")
                return code
            # The first abort always gets a retry: checkpoints are minutes apart, and stages 11 and
            # 12 save none.
            if retry > 1 and not has_progress(work, self._resumable_work()):
                _say(f"error: {fault}. Not starting it again: it made no progress this time")
                return code
            _say(f"-- {fault}. Starting it again from where it was ({retry} of {self._retries})")

    def _run_once(self) -> int:
        stage = self._start()
        self._stage = stage
        if self._first_signal is not None:  # it came while the stage was starting
            stage.stop()
        if self._kill_requested:
            stage.kill()
        code = stage.wait(self._every_second)
        self._stage = None
        return code

    def _every_second(self) -> None:
        runner_is_gone = self._runner is not None and os.getppid() != self._runner
        if runner_is_gone and self._first_signal is None:
            self._stop(signal.SIGHUP)
        if time.monotonic() > self._offer_kill_at:
            self._offer_kill_at = math.inf
            _say(
                f"-- {self._name}: still finishing the step in progress; press ^C again to stop "
                "at once"
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_interrupt = number in (signal.SIGINT, signal.SIGUSR1)
        if self._first_signal is None:
            self._stop(signal.SIGINT if is_interrupt else signal.Signals(number))
        elif is_interrupt or time.monotonic() > self._first_signal_at + SECONDS_OF_ONE_REQUEST:
            self._kill()

    def _stop(self, first_signal: signal.Signals) -> None:
        self._first_signal, self._first_signal_at = first_signal, time.monotonic()
        self._offer_kill_at = self._first_signal_at + SECONDS_OF_PATIENCE
        if self._stage is not None:
            self._stage.stop()

    def _kill(self) -> None:
        """End the stage at once. Its checkpoints and rows stay on disk."""
        self._kill_requested = True
        if self._stage is not None:
            self._stage.kill()


@contextmanager
def sign_of_life() -> Iterator[None]:
    """Hold a locked file that tells the stage its supervisor is alive; see signals.SUPERVISOR."""
    with tempfile.NamedTemporaryFile(prefix="supervisor-") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.environ[SUPERVISOR] = file.name
        try:
            yield
        finally:
            del os.environ[SUPERVISOR]


def resumable_work(config: Config) -> dict[Path, int]:
    """Return what a restart resumes from: row files with their sizes, and checkpoints with 0."""
    row_files = (config.pairs.samples, *config.run.references.glob("**/*.jsonl"))
    checkpoints = config.run.checkpoints.glob("[!.]*")
    sizes = {path: path.stat().st_size for path in row_files if path.exists()}
    return sizes | dict.fromkeys(checkpoints, 0)


def has_progress(before: dict[Path, int], after: dict[Path, int]) -> bool:
    """Return whether `after` has a new checkpoint, or a file with more rows."""
    return any(size > before.get(path, 0) or path not in before for path, size in after.items())


def minutes_to_go(config: Config, name: str) -> float | None:
    """Return the minutes of the stages after `name`, from the plan that `--check` wrote.

    Return None if there is no plan for this config.
    """
    try:
        plan = json.loads(config.run.plan.read_text(encoding="utf-8"))
        if plan["config"] != configs.digest(config):
            return None
        return sum(float(value) for stage, value in plan["minutes"].items() if stage > name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _preload() -> str:
    """Return the stage's LD_PRELOAD: OpenBLAS where scripts/environment.sh has set it up."""
    return os.environ.get("MLX_PRELOAD") or os.environ.get("LD_PRELOAD", "")


def _ignore_terminal_signals() -> None:
    """Run in the child: the supervisor passes signals on, and mlx.launch must outlive ^C."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def blas_threads(options: list[str]) -> str:
    """Return the BLAS threads of each process: processes on one CPU share its cores.

    `options` are those of mlx.launch, which reports faults in them. A number of threads that the
    user has set stands.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-n", "--repeat-hosts", nargs="?", default="1", const="1")
    value = parser.parse_known_args(options)[0].repeat_hosts
    processes = int(value) if value.isdecimal() else 1
    share = (os.cpu_count() or 1) // max(1, processes)
    return os.environ.get("OPENBLAS_NUM_THREADS") or str(max(1, share))


def has_cpu_for_two() -> bool:
    """Return whether MLX computes on a CPU with two or more cores.

    There, two processes with half of the cores each are faster than one with all.
    """
    if (os.cpu_count() or 1) < 2:
        return False
    import mlx.core as mx  # slow to import, and needed only here

    return mx.default_device() == mx.cpu


def starter(command: list[str], launch: str) -> Callable[[], SingleProcess | LaunchedProcesses]:
    """Return a function that starts the stage in as many processes as `--launch` says.

    Raises UserError if `launch` has a quote without its partner.
    """
    options = _split_options(launch)
    script = Path(command[1]).name
    if launch == "none" or script not in STAGES_FOR_SEVERAL_PROCESSES:
        return lambda: SingleProcess(command)
    if launch != "auto":
        return lambda: LaunchedProcesses(command, options)
    if not has_cpu_for_two():
        return lambda: SingleProcess(command)
    print(f"-- two processes share {script}; --launch none uses one", flush=True)
    return lambda: LaunchedProcesses(command, ["-n", "2", "--starting-port", _random_port()])


def _split_options(launch: str) -> list[str]:
    try:
        return shlex.split(launch)
    except ValueError as error:
        raise UserError(f"--launch: {error} in {launch}; see mlx.launch --help") from error


def _random_port() -> str:
    """Return a port that another run at the same time will hardly use.

    Linux and macOS do not give ports from this range to outgoing connections.
    """
    return str(20000 + random.randrange(10000))


def _load_config(path: Path, overrides: list[str]) -> Config | None:
    """Return the run's config, or None if it has faults, which the stage will report."""
    try:
        return configs.load(path, overrides)
    except UserError:
        return None


def _say_minutes_to_go(minutes: float | None) -> None:
    if minutes:
        _say(f"-- about {max(1, round(minutes))} minutes to go")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("script", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--launch", default="none")
    parser.add_argument("--retries", type=int, default=3)
    parser.add_argument("--runner", type=int, help="end the stage when this process is gone")
    return parser


def main() -> int:
    """Run the stage that the arguments name, and return its exit code."""
    options = _parser().parse_args()
    name = options.script.name
    config = None if options.config is None else _load_config(options.config, options.overrides)
    arguments = [] if options.config is None else ["--config", str(options.config)]
    arguments += [part for override in options.overrides for part in ("--set", override)]
    supervisor = Supervisor(
        name,
        starter([sys.executable, str(options.script), *arguments], options.launch),
        lambda: {} if config is None else resumable_work(config),
        options.retries,
        options.runner,
    )
    os.environ[LAUNCH] = options.launch
    with sign_of_life():
        code = supervisor.run()
    if config is not None and code in (0, STOPPED_BY_GUARD) and name >= FIRST_LONG_STAGE:
        _say_minutes_to_go(minutes_to_go(config, name))
    return code


if __name__ == "__main__":
    last_resort.run_and_exit(main)
