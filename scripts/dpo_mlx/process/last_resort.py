"""Turns every exception into error lines and an exit code."""

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

DETAILS = "the details are in "  # the start of the note that `logged` adds

# Limits: characters of a line, lines of an error, characters of an exception's text, of error.log.
MAX_CHARACTERS, MAX_LINES, MAX_TEXT, MAX_LOG = 1000, 50, 300, 1_000_000

PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy")
CODE = Path(__file__).parents[2]
PUT_BACK = "put back the file or the disk that was moved, and run the same command again"
OTHER_PLACE = "choose another path in the config"
DISK_FULL = "the disk is full; free some space, then run the same command again to resume"
REMEDIES = {
    errno.EACCES: f"make it writable, or {OTHER_PLACE}",
    errno.ENOENT: PUT_BACK,
    errno.EMFILE: "run `ulimit -n 1024` first",
}
REMEDIES |= dict.fromkeys((errno.EPERM, errno.EROFS), REMEDIES[errno.EACCES])
REMEDIES |= dict.fromkeys((errno.ESTALE, errno.EIO, errno.ENXIO), PUT_BACK)


def run_and_exit(program: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with its code. On an exception, print error lines and exit with the
    code of the error.
    """
    with terminal.protected():
        code = exit_code_of(program)
    sys.exit(code)


def exit_code_of(program: Callable[[], int | None]) -> int:
    """Run a program and return its exit code. On an exception, print error lines on stderr and
    return 130 for ^C, 143 for SIGTERM, 129 for a closed terminal, one of aborts.CODES for a GPU
    error, and 1 for any other error.
    """
    code = _exit_code_of(program)
    try:
        sys.stdout.flush()
    except terminal.OutputLost as error:
        print_errors(str(error))
        return code or 1
    return code


def _exit_code_of(program: Callable[[], int | None]) -> int:
    try:
        _require_working_directory()
        return program() or 0
    except SystemExit as stop:  # argparse has printed its error
        return _code_of_system_exit(stop)
    except signals.Interrupted as stop:
        _print_line("stopped; run the same command again to resume")
        return stop.exit_code
    except KeyboardInterrupt:  # before there was work to save
        _print_line("stopped")
        return 130
    except UserError as error:
        print_errors(str(error))
        return aborts.LOST if isinstance(error, LostProcess) else 1
    except BaseException as error:  # a panic in a Rust library is not an Exception
        code, line = explain(error)
        print_errors(line)
        return code


def print_errors(text: str) -> None:
    """Print each line of `text` as an error, at most MAX_LINES of them, and cut long lines."""
    lines = text.split("\n")
    for line in lines[:MAX_LINES]:
        _print_line(f"error: {line}")
    if len(lines) > MAX_LINES:
        _print_line(f"error: and {len(lines) - MAX_LINES} more")


def _print_line(line: str) -> None:
    print(cut(line, MAX_CHARACTERS), file=sys.stderr, flush=True)


def _require_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            "the working directory was deleted or moved; cd to an existing folder and run again"
        ) from error


def _code_of_system_exit(stop: SystemExit) -> int:
    if isinstance(stop.code, int | None):
        return stop.code or 0
    print_errors(reason(stop, MAX_TEXT))
    return 1


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the error line of an exception that is not a UserError."""
    return _explain_machine_fault(error) or (
        1,
        f"{_place(error)}: {_cause(error)}{_details(error)}",
    )


def _explain_machine_fault(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the error line when the GPU or a disk failed. None for any other error."""
    if isinstance(error, RuntimeError) and (code := aborts.of_gpu_error(error)) is not None:
        return code, f"{reason(error, MAX_TEXT)} Cause: {aborts.explain(code)}"
    if isinstance(error, OSError) and (line := _explain_disk_fault(error)) is not None:
        return 1, line
    return None


def _explain_disk_fault(error: OSError) -> str | None:
    """The error line: which file, what happened, what to do. None when the error names no file."""
    file = error.filename or _activity(error)
    if file is None or error.errno is None:
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{file}: {DISK_FULL}"
    strerror = error.strerror or os.strerror(error.errno)
    return f"{file}: {strerror}; {REMEDIES.get(error.errno, OTHER_PLACE)}"


def _cause(error: BaseException) -> str:
    if aborts.is_out_of_memory(error):
        return f"out of memory; {aborts.LESS_MEMORY}"
    if isinstance(error, RecursionError):
        return (
            "the config, the data or the model folder has a value that is nested too deeply "
            f"({_our_frame(error)}); reduce the nesting"
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("dpo_mlx"):
        cause = reason(error, MAX_TEXT)
        return (
            f"a Python package is missing or damaged ({cause}) in {sys.prefix}; run "
            "./train_dpo_run1.sh, which installs the packages, or activate its .venv"
        )
    name = type(error).__name__
    text = reason(error, MAX_TEXT)
    description = name if text == name else f"{name}: {text}"
    return f"{description} ({_our_frame(error)}); this is a bug in the pipeline, please report it"


def _our_frame(error: BaseException) -> str:
    """The file and line of our code where the exception was raised."""
    frames = [
        (Path(frame.f_code.co_filename), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    ours = [frame for frame in frames if frame[0].is_relative_to(CODE)]
    path, line = (ours or frames)[-1]
    return f"{path.name}:{line}"


def _activity(error: BaseException) -> str | None:
    """The note of the innermost `doing`."""
    return next((note for note in _notes(error) if note.startswith(WHILE)), None)


def _place(error: BaseException) -> str:
    script = Path(sys.argv[0]).name
    activity = _activity(error)
    return f"{script}, {activity}" if activity else script


def _details(error: BaseException) -> str:
    """Where error.log is, if it was written."""
    notes = [note for note in _notes(error) if note.startswith(DETAILS)]
    return f"; {notes[-1]}" if notes else ""


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@contextmanager
def logged(run: RunFolder) -> Iterator[None]:
    """Write the traceback of an exception that may be our bug to the run's error.log, unless
    the user owns a file of that name or it cannot be written.
    """
    try:
        yield
    except (UserError, signals.Interrupted, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if _explain_machine_fault(error) is None and (path := _write_log(run.error_log, error)):
            error.add_note(f"{DETAILS}{path}")
        raise


def _write_log(path: Path, error: BaseException) -> Path | None:
    """Returns the path, or None when the log could not be written."""
    try:
        lines = [time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv), versions()]
        text = "\n".join([*lines, "", *traceback.format_exception(error)])
        jsonl.write_text(path, text[:MAX_LOG].encode(errors="backslashreplace").decode())
    except Exception:  # the first error must be printed even if its log cannot be written
        return None
    return path


def versions() -> str:
    """One line with the versions of Python, the platform and the packages."""
    words = [f"Python {platform.python_version()}", platform.platform()]
    for name in PACKAGES:
        try:
            words.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            words.append(f"no {name}")
    return ", ".join(words)
