"""What every numbered script shares: its arguments, its exit code, its one line on a fault."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from . import config as configs
from .config import Config
from .errors import UserError

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
    """Run a stage and exit: 0, its own code, 1 with one line for a user's mistake, 130 for ^C."""
    options = arguments.parse_args()
    try:
        sys.exit(stage(configs.load(options.config, options.overrides), options))
    except UserError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


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
