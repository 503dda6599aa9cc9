#!/usr/bin/env python3
"""Print what a whole run needs on this machine, before anything is sampled or trained.

Prints the download size, the disk space, and each stage's memory and minutes, from a short probe of
the machine. Exits 1 when something does not fit.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config


def stage(config: Config, options: argparse.Namespace) -> None:
    from dpo_mlx.stages.check_run import check_run

    cli.warn_without_blas()
    check_run(config)


if __name__ == "__main__":
    cli.main(stage, cli.parser(__doc__))
