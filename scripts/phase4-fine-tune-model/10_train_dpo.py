#!/usr/bin/env python3
"""Train LoRA adapters with a preference loss against the frozen base model."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config

STOPPED = 3  # by a guard: a finding, with the best adapters kept


def stage(config: Config, options: argparse.Namespace) -> int:
    from dpo_mlx.job import prepare
    from dpo_mlx.train_dpo import preflight, train_dpo

    cli.warn_without_blas()
    if options.check:
        preflight(prepare(config))
        return 0
    return 0 if train_dpo(config, options.stage) else STOPPED


def main() -> None:
    parser = cli.parser(__doc__)
    stages = ("precompute", "train", "all")
    parser.add_argument("--stage", choices=stages, default="all", help="default: all")
    parser.add_argument("--check", action="store_true", help="say what a run would do, and stop")
    cli.main(stage, parser)


if __name__ == "__main__":
    main()
