#!/usr/bin/env python3
"""Train LoRA adapters with a preference loss against the frozen base model."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config
from dpo_mlx.train_dpo import STAGES, describe, prepare, train_dpo


def stage(config: Config, options: argparse.Namespace) -> None:
    cli.warn_without_blas()
    if options.check:
        describe(prepare(config))
    else:
        train_dpo(config, options.stage)


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, default="all", help="default: all")
    parser.add_argument("--check", action="store_true", help="say what a run would do, and stop")
    cli.main(stage, parser)


if __name__ == "__main__":
    main()
