"""Run one stage in its own processes, pass signals on to it, and restart it when it aborts.

    python -m dpo_mlx.process.supervisor SCRIPT [--config FILE] [--set section.key=value ...]
        [--launch none|auto|OPTIONS] [--retries N] [--runner PROCESS]

The runner starts every stage like this. The exit code is the stage's: 130, 143 or 129 after ^C,
SIGTERM or SIGHUP, and one of aborts.CODES when the stage aborted too often. SIGUSR1 ends the stage
at once. When the runner is gone, that counts as SIGHUP.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import random
import re
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

# mlx.launch reports no exit codes. `cli.main` appends rank 0's process number, then its exit code,
# to the file that this variable names.
RANK_0 = "DPO_RANK_0"

STOPPED_BY_GUARD = 3  # stage 10's exit code; the chain goes on
SECONDS_BETWEEN_LOOKS = 1  # at whether the runner is there; also between newlines for mlx.launch
SECONDS_OF_PATIENCE = 10  # from a request to stop to the line that says why it takes so long
SECONDS_TO_DIE = 10  # for processes that SIGKILL was sent to


class Process:
    """A stage in one process."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "LD_PRELOAD": _preload()}
        self._process = subprocess.Popen(command, env=environment, preexec_fn=_ignore_terminal)

    def stop(self) -> None:
        """Ask the stage to save and end, also when it was frozen with SIGSTOP."""
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the stage at once."""
        self._process.kill()

    def wait(self, look: Callable[[], None]) -> int:
        """The exit code, as a shell reports it; calls `look` every second until there is one."""
        while _is_running(self._process):
            look()
        code = self._process.returncode
        return code if code >= 0 else 128 - code


class SharedProcess:
    """A stage in the processes that `mlx.launch` starts; rank 0 speaks for all of them.

    On this machine all are in one process group, apart from the supervisor's.
    """

    def __init__(self, command: list[str], launch: str) -> None:
        self._stopping = self._stop_wanted = False
        descriptor, name = tempfile.mkstemp(prefix="rank-0-")
        os.close(descriptor)
        self._rank_0 = Path(name)
        variables = {
            RANK_0: name,
            "LD_PRELOAD": _preload(),
            "OPENBLAS_NUM_THREADS": _blas_threads(launch),
        }
        sets = [part for pair in variables.items() for part in ("--env", "=".join(pair))]
        self._launcher = subprocess.Popen(
            ["mlx.launch", *_words(launch), *sets, "--", *command],
            stdin=subprocess.PIPE,
            bufsize=0,
            preexec_fn=_ignore_terminal,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Ask rank 0, once it has started, to save and end; the others end with it, also when one
        was frozen with SIGSTOP.
        """
        self._stopping = self._stop_wanted = True
        if numbers := self._numbers():
            with suppress(ProcessLookupError):
                os.kill(numbers[0], signal.SIGTERM)
            self._signal_group(signal.SIGCONT)
            self._stopping = False

    def kill(self) -> None:
        """End all processes at once."""
        self._signal_group(signal.SIGKILL)

    def wait(self, look: Callable[[], None]) -> int:
        """Rank 0's exit code; LOST if a process died, 1 if rank 0 never started. Calls `look` every
        second until then.

        When a process dies, mlx.launch ends the others with SIGTERM. When mlx.launch itself was
        killed, the others would go on, and hold the run's folder.
        """
        while _is_running(self._launcher):
            look()
            if self._stopping:
                self.stop()
            self._type_newline()
        self._end_group()
        numbers = self._numbers()
        self._rank_0.unlink(missing_ok=True)
        if not numbers:
            return 1 if self._launcher.returncode >= 0 else aborts.LOST
        ended_by_launcher = not self._stop_wanted and numbers[1:] == [128 + signal.SIGTERM]
        return aborts.LOST if len(numbers) == 1 or ended_by_launcher else numbers[1]

    def _end_group(self) -> None:
        """End what outlived the launcher, and wait until it is gone."""
        give_up = time.monotonic() + SECONDS_TO_DIE
        while self._signal_group(signal.SIGKILL) and time.monotonic() < give_up:
            time.sleep(0.05)

    def _signal_group(self, number: signal.Signals) -> bool:
        """Whether any process was there to get the signal."""
        try:
            os.killpg(self._launcher.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS refuses when all of them have ended
            return False
        return True

    def _type_newline(self) -> None:
        """The launcher's threads stay busy until every process has refused some input."""
        assert self._launcher.stdin is not None
        with suppress(BrokenPipeError):
            self._launcher.stdin.write(b"\n")

    def _numbers(self) -> list[int]:
        """What rank 0 has written so far: its process number, its exit code."""
        if not self._rank_0.exists():  # the signal came after the stage's end
            return []
        return [int(word) for word in self._rank_0.read_text().split()]


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Whether it still is after a second."""
    try:
        process.wait(SECONDS_BETWEEN_LOOKS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _words(launch: str) -> list[str]:
    try:
        return shlex.split(launch)
    except ValueError as error:
        raise UserError(f"--launch: {error} in {launch}; see mlx.launch --help") from error


class Supervisor:
    """Runs a stage until it ends, is stopped by a signal, or has aborted too often.

    `start` starts the stage, `kept_work` lists the work that a restart resumes from, `name` is the
    script's name, `runner` the process number of the runner, if there is one.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Process | SharedProcess],
        kept_work: Callable[[], dict[Path, int]],
        retries: int,
        runner: int | None = None,
    ) -> None:
        self._name, self._start, self._kept_work = name, start, kept_work
        self._retries, self._runner = retries, runner
        self._process: Process | SharedProcess | None = None
        self._signalled: signal.Signals | None = None
        self._kill_wanted = False
        self._say_patience_at = math.inf

    def run(self) -> int:
        """The stage's exit code, or 128 + the first signal that came."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._hand_on)
        signal.signal(signal.SIGUSR1, self._kill)
        started = time.monotonic()
        code = self._run_with_retries()
        if self._signalled is not None:
            return 128 + self._signalled
        _say(f"-- {self._name}: {time.monotonic() - started:.0f} s")
        return code

    def _run_with_retries(self) -> int:
        retry = 0
        while True:
            before = self._kept_work()
            code = self._run_once()
            if self._signalled is not None or code not in aborts.CODES:
                return code
            _say("")  # the stage may have left a progress bar
            fault = f"{self._name} aborted (exit {code}): {aborts.explain(code)}"
            retry += 1
            if retry > self._retries:
                _say(f"error: {fault}. Not starting it again (--retries {self._retries})")
                return code
            # The first abort always gets a retry: checkpoints are minutes apart, and stages 11 and
            # 12 save none.
            if retry > 1 and not has_grown(before, self._kept_work()):
                _say(f"error: {fault}. Not starting it again: it made no progress this time")
                return code
            _say(f"-- {fault}. Starting it again from where it was ({retry} of {self._retries})")

    def _run_once(self) -> int:
        process = self._start()
        self._process = process
        if self._signalled is not None:  # the signal came while the stage was starting
            process.stop()
        if self._kill_wanted:
            process.kill()
        code = process.wait(self._look)
        self._process = None
        return code

    def _look(self) -> None:
        """What is to be done every second."""
        if self._runner is not None and os.getppid() != self._runner:
            self._hand_on(signal.SIGHUP, None)
        if time.monotonic() > self._say_patience_at:
            self._say_patience_at = math.inf
            _say(
                f"-- {self._name}: still finishing the step in progress; press ^C again to stop "
                "at once"
            )

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        """Pass the first signal on to the stage. More of them are the same request: ^C and a closed
        window reach the runner, which hands them on, and the supervisor too.
        """
        if self._signalled is not None:
            return
        self._signalled = signal.Signals(number)
        self._say_patience_at = time.monotonic() + SECONDS_OF_PATIENCE
        if self._process is not None:
            self._process.stop()

    def _kill(self, number: int, frame: FrameType | None) -> None:
        """The runner got a second signal: end the stage at once. Checkpoints and rows are kept."""
        self._kill_wanted = True
        self._signalled = self._signalled or signal.SIGTERM
        if self._process is not None:
            self._process.kill()


@contextmanager
def held_for_the_stage() -> Iterator[None]:
    """Within, a locked file tells the stage that its supervisor lives: see signals.SUPERVISOR."""
    with tempfile.NamedTemporaryFile(prefix="supervisor-") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.environ[SUPERVISOR] = file.name
        try:
            yield
        finally:
            del os.environ[SUPERVISOR]


def kept_work(config: Config) -> dict[Path, int]:
    """The work that a restart resumes from: checkpoints, and files of rows with their bytes."""
    rows = (config.pairs.samples, *config.run.references.glob("**/*.jsonl"))
    checkpoints = config.run.checkpoints.glob("[!.]*")
    sizes = {path: path.stat().st_size for path in rows if path.exists()}
    return sizes | dict.fromkeys(checkpoints, 0)


def has_grown(before: dict[Path, int], after: dict[Path, int]) -> bool:
    """Whether a checkpoint is new, or a file has more rows."""
    return any(size > before.get(path, 0) or path not in before for path, size in after.items())


def minutes_to_go(config: Config, name: str) -> float | None:
    """Minutes of the stages after `name`, from the plan that `--check` wrote for this config; None
    without one.
    """
    try:
        plan = json.loads(config.run.plan.read_text(encoding="utf-8"))
        if plan["config"] != configs.digest(config):
            return None
        return sum(float(value) for stage, value in plan["minutes"].items() if stage > name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _preload() -> str:
    """The stage's LD_PRELOAD: OpenBLAS where scripts/environment.sh found it."""
    return os.environ.get("MLX_PRELOAD") or os.environ.get("LD_PRELOAD", "")


def _ignore_terminal() -> None:
    """Runs in the child. Stages set their own handlers, and mlx.launch must outlive ^C."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _blas_threads(launch: str) -> str:
    """BLAS threads for each process. Processes on one CPU must split its cores to be fast."""
    match = re.search(r"(?:-n|--repeat-hosts)[= ]*(\d+)", launch)
    processes = int(match[1]) if match else 1
    cores = os.cpu_count() or 1
    return os.environ.get("OPENBLAS_NUM_THREADS") or str(max(1, cores // max(1, processes)))


def has_cpu_for_two() -> bool:
    """On a CPU, two processes with half of the cores each are faster than one with all."""
    if (os.cpu_count() or 1) < 2:
        return False
    import mlx.core as mx  # slow to import, and needed only here

    return mx.default_device() == mx.cpu


def _starter(command: list[str], launch: str) -> Callable[[], Process | SharedProcess]:
    """A function that starts the stage the way `--launch` says."""
    if launch == "none" or (launch == "auto" and not has_cpu_for_two()):
        return lambda: Process(command)
    if launch == "auto":
        script = Path(command[1]).name
        print(f"-- two processes share {script}; --launch none uses one", flush=True)
        # Concurrent runs need different ports. Linux assigns none of these by itself.
        return lambda: SharedProcess(
            command, f"-n 2 --starting-port {20000 + random.randrange(10000)}"
        )
    return lambda: SharedProcess(command, launch)


def _load(path: Path, overrides: list[str]) -> Config | None:
    """The run's config; None if it has faults, which the stage itself will report."""
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
    """Supervise the stage that the arguments name; its exit code."""
    options = _parser().parse_args()
    name = options.script.name
    config = None if options.config is None else _load(options.config, options.overrides)
    arguments = [] if options.config is None else ["--config", str(options.config)]
    arguments += [part for override in options.overrides for part in ("--set", override)]
    supervisor = Supervisor(
        name,
        _starter([sys.executable, str(options.script), *arguments], options.launch),
        lambda: {} if config is None else kept_work(config),
        options.retries,
        options.runner,
    )
    with held_for_the_stage():
        code = supervisor.run()
    if config is not None and code in (0, STOPPED_BY_GUARD):
        _say_minutes_to_go(minutes_to_go(config, name))
    return code


if __name__ == "__main__":
    last_resort.run_and_exit(main)
