"""Every way a program can fail becomes one line and an exit code."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ..files import jsonl
from ..files.errors import WHILE, LostProcess, UserError
from ..files.run_folder import RunFolder
from ..files.text import cut, reason
from . import aborts, signals, terminal

DETAILS = "the details are in "  # begins the note that `logged` adds

# The most characters of a line, lines of an error, characters of an unexpected exception's text and
# of a log.
MOST_CHARACTERS, MOST_LINES, MOST_OF_TEXT, MOST_OF_LOG = 1000, 50, 300, 1_000_000

PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy")
CODE = Path(__file__).parents[2]
HERE = "put back what was moved or taken away, and run again"
ELSEWHERE = "name another place in the config"
DISK_FULL = "the disk is full; free some space, and the same command goes on from here"
REMEDIES = {
    errno.EACCES: f"make it writable, or {ELSEWHERE}",
    errno.ENOENT: HERE,
    errno.EMFILE: "too many files are open; run `ulimit -n 1024` first",
}
REMEDIES |= dict.fromkeys((errno.EPERM, errno.EROFS), REMEDIES[errno.EACCES])
REMEDIES |= dict.fromkeys((errno.ESTALE, errno.EIO, errno.ENXIO), HERE)


def guarded(run: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with its code, or with a line and the code of what went wrong."""
    with terminal.protected():
        code = code_of(run)
    sys.exit(code)


def code_of(run: Callable[[], int | None]) -> int:
    """The exit code of what is run, after a line on stderr when that is a fault: 1 for most, 130
    for ^C, 143 for SIGTERM, 129 when the terminal is gone, one of aborts.CODES for a GPU error.
    """
    code = _code_of(run)
    try:
        sys.stdout.flush()
    except terminal.OutputLost as error:
        say_errors(str(error))
        return code or 1
    return code


def _code_of(run: Callable[[], int | None]) -> int:
    try:
        _require_working_directory()
        return run() or 0
    except SystemExit as stop:  # argparse has said its line
        return _code_of_exit(stop)
    except signals.Interrupted as stop:
        _say(f"stopped by {stop}; the same command goes on from here")
        return stop.exit_code
    except KeyboardInterrupt:  # before there was work to save
        _say("stopped by SIGINT")
        return 130
    except UserError as error:
        say_errors(str(error))
        return aborts.LOST if isinstance(error, LostProcess) else 1
    except BaseException as error:  # a panic in a Rust library is not an Exception
        code, line = explain(error)
        say_errors(line)
        return code


def say_errors(text: str) -> None:
    """Print each line of `text` as an error: not too long, and not too many."""
    lines = text.split("\n")
    for line in lines[:MOST_LINES]:
        _say(f"error: {line}")
    if len(lines) > MOST_LINES:
        _say(f"error: and {len(lines) - MOST_LINES} more")


def _say(line: str) -> None:
    print(cut(line, MOST_CHARACTERS), file=sys.stderr, flush=True)


def _require_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            "the working directory was deleted or moved; cd to a folder that exists, and run again"
        ) from error


def _code_of_exit(stop: SystemExit) -> int:
    if isinstance(stop.code, int | None):
        return stop.code or 0
    say_errors(reason(stop, MOST_OF_TEXT))
    return 1


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an exception that is not a UserError."""
    return _of_the_machine(error) or (1, f"{_place(error)}: {_cause(error)}{_details(error)}")


def _of_the_machine(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line for a fault of the GPU or a disk; None for any other."""
    if isinstance(error, RuntimeError) and (code := aborts.of_gpu_error(error)) is not None:
        return code, f"{reason(error, MOST_OF_TEXT)} Cause: {aborts.explain(code)}"
    if isinstance(error, OSError) and (line := _of_the_disk(error)) is not None:
        return 1, line
    return None


def _of_the_disk(error: OSError) -> str | None:
    """What happened to which file, and the remedy; None when the error tells neither."""
    file = error.filename or _activity(error)
    if file is None or error.errno is None:
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{file}: {DISK_FULL}"
    strerror = error.strerror or os.strerror(error.errno)
    return f"{file}: {strerror}; {REMEDIES.get(error.errno, ELSEWHERE)}"


def _cause(error: BaseException) -> str:
    if aborts.is_out_of_memory(error):
        return f"memory ran out; {aborts.LESS_MEMORY}"
    if isinstance(error, RecursionError):
        return (
            "something in the config, the data or the model folder is nested too deeply "
            f"({_our_frame(error)}); make it flatter"
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("dpo_mlx"):
        cause = reason(error, MOST_OF_TEXT)
        return (
            f"a Python package is missing or damaged ({cause}) in {sys.prefix}; start "
            "./train_dpo_run1.sh, which installs them, or activate its .venv"
        )
    name = type(error).__name__
    text = reason(error, MOST_OF_TEXT)
    said = name if text == name else f"{name}: {text}"
    return f"{said} ({_our_frame(error)}); this is a fault of the pipeline"


def _our_frame(error: BaseException) -> str:
    """The module and line of our code that the exception came out of."""
    frames = [
        (Path(frame.f_code.co_filename), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    ours = [frame for frame in frames if frame[0].is_relative_to(CODE)]
    path, line = (ours or frames)[-1]
    return f"{path.name}:{line}"


def _activity(error: BaseException) -> str | None:
    """What the innermost `doing` says."""
    return next((note for note in _notes(error) if note.startswith(WHILE)), None)


def _place(error: BaseException) -> str:
    script = Path(sys.argv[0]).name
    activity = _activity(error)
    return f"{script}, {activity}" if activity else script


def _details(error: BaseException) -> str:
    """Where the log is, when one was written."""
    notes = [note for note in _notes(error) if note.startswith(DETAILS)]
    return f"; {notes[-1]}" if notes else ""


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@contextmanager
def logged(run: RunFolder) -> Iterator[None]:
    """Within, an exception that may be a fault of ours leaves its traceback in the run's
    error.log, unless that file is somebody else's or cannot be written.
    """
    try:
        yield
    except (UserError, signals.Interrupted, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if _of_the_machine(error) is None and (path := _write_log(run.error_log, error)):
            error.add_note(f"{DETAILS}{path}")
        raise


def _write_log(path: Path, error: BaseException) -> Path | None:
    """The path, or None when nothing was written."""
    try:
        lines = [time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv), versions()]
        text = "\n".join([*lines, "", *traceback.format_exception(error)])
        jsonl.write_text(path, text[:MOST_OF_LOG].encode(errors="backslashreplace").decode())
    except Exception:  # the line about the first fault must come, whatever happens to its log
        return None
    return path


def versions() -> str:
    """Python's, the platform's and the packages' versions, on one line."""
    words = [f"Python {platform.python_version()}", platform.platform()]
    for name in PACKAGES:
        try:
            words.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            words.append(f"no {name}")
    return ", ".join(words)
