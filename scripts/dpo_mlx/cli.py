"""What every numbered script shares: its arguments, its exit code, its one line on a fault."""

from __future__ import annotations

import argparse
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from .files import lock
from .process import awake, last_resort, signals

try:
    from . import config as configs
    from .config import Config
except ImportError as error:  # no PyYAML: not the Python that the packages are installed in
    sys.exit(f"error: {last_resort.explain(error)[1]}")
from .files.errors import UserError, doing
from .files.text import cut
from .process.supervisor import RANK_0

Stage = Callable[[Config, argparse.Namespace], int | None]


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments without repeating all of a long one."""

    def error(self, message: str) -> NoReturn:
        super().error(cut(message, last_resort.MOST_OF_TEXT))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all stages take."""
    arguments = Parser(description=description)
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


def main(stage: Stage, arguments: argparse.ArgumentParser) -> NoReturn:
    """Run a stage in its run's folder and exit: 0, its own code, or the code of what went wrong
    (see last_resort.code_of).

    Under `mlx.launch` that is what rank 0 does, with the other ranks' help. As the launcher keeps
    exit codes to itself, and adds a line to those that are not 0, the process number and the code
    go to the file that RANK_0 names, if it does.
    """
    last_resort.guarded(lambda: _main(stage, arguments.parse_args()))


def _main(stage: Stage, options: argparse.Namespace) -> int:
    # Loading what computes takes seconds, in which ^C may come, and the packages may be missing.
    from .parallel.channel import dismiss, open_channel

    require_own_libraries()
    awake.keep()
    if open_channel().size > 1:
        # The launcher's threads never rest while a process could still read what is typed.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if open_channel().rank:
        return last_resort.code_of(_help)
    _tell_runner(os.getpid())
    code = last_resort.code_of(lambda: _run(stage, options))
    dismiss()
    _tell_runner(code)
    return 0 if os.environ.get(RANK_0) else code


def _help() -> None:
    from .parallel.distributed import serve

    serve()


def _tell_runner(number: int) -> None:
    if path := os.environ.get(RANK_0):
        # A runner that was killed has taken its files along, and nobody reads this.
        with suppress(FileNotFoundError), Path(path).open("a", encoding="utf-8") as file:
            print(number, file=file)


def _run(stage: Stage, options: argparse.Namespace) -> int | None:
    with doing("loading", options.config):
        config = configs.load(options.config, options.overrides)
    with signals.caught(), lock.hold_run(config.run), last_resort.logged(config.run):
        return stage(config, options)


def require_own_libraries() -> None:
    """On a CPU, MLX compiles libraries into TMPDIR/mlx, and loads what it finds there.

    Raises UserError when someone else could put libraries there. The runner's TMPDIR is private. A
    stage alone uses the shared one, as compiling anew takes some 2 seconds a stage.
    """
    import mlx.core as mx

    if mx.default_device() != mx.cpu:
        return
    folder = Path(tempfile.gettempdir(), "mlx")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{folder}: other users could put libraries there, which MLX would load; start with "
            "TMPDIR set to a folder of your own"
        )


def warn_without_blas() -> None:
    """On a Linux CPU, say what it costs to run without OpenBLAS."""
    import mlx.core as mx

    if not sys.platform.startswith("linux") or mx.default_device() != mx.cpu:
        return
    if "openblas" not in Path("/proc/self/maps").read_text():
        print(
            "note: running without OpenBLAS, matrix products are some 60 times slower; install "
            "libopenblas0-pthread and start with LD_PRELOAD=libopenblas.so.0",
            file=sys.stderr,
        )
