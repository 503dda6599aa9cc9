"""What all numbered scripts share: arguments, exit codes and error lines."""

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
except ImportError as error:  # this Python has no PyYAML, so it is not the one in .venv
    sys.exit(f"error: {last_resort.explain(error)[1]}")
from .files.errors import UserError, doing
from .files.text import cut
from .process.supervisor import RANK_0

Stage = Callable[[Config, argparse.Namespace], int | None]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error message stays short when an argument is long."""

    def error(self, message: str) -> NoReturn:
        super().error(cut(message, last_resort.MAX_TEXT))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all stages take."""
    arguments = Parser(description=description)
    arguments.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    arguments.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of the file; can be repeated",
    )
    return arguments


def main(stage: Stage, arguments: argparse.ArgumentParser) -> NoReturn:
    """Run a stage in its run folder, then exit with the stage's code or the code of the error (see
    last_resort.exit_code_of).

    Under `mlx.launch`, rank 0 runs the stage and the other ranks compute for it. The launcher does
    not report exit codes and prints a line for each one that is not 0. Rank 0 therefore exits with
    0 and writes its process number and its code to the file named by RANK_0.
    """
    last_resort.run_and_exit(lambda: _main(stage, arguments.parse_args()))


def _main(stage: Stage, options: argparse.Namespace) -> int:
    # Imported here, where errors are caught: a package may be missing, and ^C may interrupt it.
    from .parallel.channel import dismiss, open_channel

    require_private_libraries()
    awake.keep()
    if open_channel().size > 1:
        # The launcher's threads stay busy as long as a process reads standard input.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if open_channel().rank:
        return last_resort.exit_code_of(_serve)
    _tell_supervisor(os.getpid())
    code = last_resort.exit_code_of(lambda: _run(stage, options))
    dismiss()
    _tell_supervisor(code)
    return 0 if os.environ.get(RANK_0) else code


def _serve() -> None:
    from .parallel.distributed import serve

    serve()


def _tell_supervisor(number: int) -> None:
    if path := os.environ.get(RANK_0):
        # The file is gone when the supervisor was killed. Then nobody needs the number.
        with suppress(FileNotFoundError), Path(path).open("a", encoding="utf-8") as file:
            print(number, file=file)


def _run(stage: Stage, options: argparse.Namespace) -> int | None:
    with doing("loading", options.config):
        config = configs.load(options.config, options.overrides)
    with signals.deferred(), lock.hold_run(config.run), last_resort.logged(config.run):
        return stage(config, options)


def require_private_libraries() -> None:
    """Raises UserError on a CPU when another user could replace MLX's compiled libraries.

    MLX compiles libraries into TMPDIR/mlx and loads the libraries in that folder. The runner's
    TMPDIR is private. A stage that starts alone uses the shared TMPDIR, because compiling again
    takes about 2 seconds.
    """
    import mlx.core as mx

    if mx.default_device() != mx.cpu:
        return
    folder = Path(tempfile.gettempdir(), "mlx")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_ours or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{folder}: other users can write to this folder, and MLX loads libraries from it; "
            "set TMPDIR to a folder of your own"
        )


def warn_without_blas() -> None:
    """Print a note when MLX runs on a Linux CPU without OpenBLAS."""
    import mlx.core as mx

    if not sys.platform.startswith("linux") or mx.default_device() != mx.cpu:
        return
    if "openblas" not in Path("/proc/self/maps").read_text():
        print(
            "note: OpenBLAS is not loaded, so matrix products are about 60 times slower; install "
            "libopenblas0-pthread and start with LD_PRELOAD=libopenblas.so.0",
            file=sys.stderr,
        )
