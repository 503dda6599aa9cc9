"""What every numbered script shares: its arguments, its exit code, its one line on a fault."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from . import aborts, awake, lock, signals
from . import config as configs
from .config import Config
from .errors import UserError
from .link import LostProcess, dismiss, link
from .supervisor import RANK_0

Stage = Callable[[Config, argparse.Namespace], int | None]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all stages take."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    arguments.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="wins over the file; may be repeated",
    )
    return arguments


def main(stage: Stage, arguments: argparse.ArgumentParser) -> None:
    """Run a stage in its run's folder and exit: 0, its own code, 1 after one line about a user's
    mistake or a disk error, 130 for ^C, 143 for SIGTERM, one of aborts.CODES for a GPU error.

    Under `mlx.launch` that is what rank 0 does, with the other ranks' help. As the launcher keeps
    exit codes to itself, and adds a line to those that are not 0, the process number and the code
    go to the file that RANK_0 names, if it does.
    """
    options = arguments.parse_args()
    awake.keep()
    if link().size > 1:
        # The launcher's threads never rest while a process could still read what is typed.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if link().rank:
        sys.exit(_code_of(_help))
    _tell_runner(os.getpid())
    code = _code_of(lambda: _run(stage, options))
    dismiss()
    _tell_runner(code)
    sys.exit(0 if os.environ.get(RANK_0) else code)


def _help() -> None:
    from .team import serve  # with all that computes, which not every stage needs

    serve()


def _tell_runner(number: int) -> None:
    if path := os.environ.get(RANK_0):
        with Path(path).open("a", encoding="utf-8") as file:
            print(number, file=file)


def _run(stage: Stage, options: argparse.Namespace) -> int | None:
    config = configs.load(options.config, options.overrides)
    with signals.caught(), lock.run_folder(config.run):
        return stage(config, options)


def _code_of(run: Callable[[], int | None]) -> int:
    """The exit code of what is run; a fault has said its line."""
    try:
        return run() or 0
    except LostProcess as error:
        print(f"error: {error}", file=sys.stderr)
        return aborts.LOST
    except UserError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {_of_the_disk(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        code = aborts.of_gpu_error(error)
        if code is None:
            raise
        print(f"error: {error} Cause: {aborts.explain(code)}", file=sys.stderr)
        return code
    except signals.Interrupted as stop:
        print(f"stopped by {stop}; the same command goes on from here", file=sys.stderr)
        return stop.exit_code


def _of_the_disk(error: OSError) -> str:
    """What happened to which file, and the remedy."""
    if error.filename is None:
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "the disk is full; free some space, and the same command goes on from here"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = f"{error.strerror}; make it writable, or name another place in the config"
    elif error.errno in (errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENXIO):
        remedy = f"{error.strerror}; put back what was moved or taken away, and run again"
    else:
        remedy = str(error.strerror)
    return f"{error.filename}: {remedy}"


def warn_without_blas() -> None:
    """On a Linux CPU, say what it costs to run without OpenBLAS."""
    if not sys.platform.startswith("linux") or mx.default_device() != mx.cpu:
        return
    if "openblas" not in Path("/proc/self/maps").read_text():
        print(
            "note: running without OpenBLAS, matrix products are some 60 times slower; install "
            "libopenblas0-pthread and start with LD_PRELOAD=libopenblas.so.0",
            file=sys.stderr,
        )
