#!/usr/bin/env python3
"""Train LoRA adapters: supervised fine-tuning, then DPO against a frozen reference."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config

STOPPED = 3  # exit code when a guard stopped training; the best adapters are kept

# The values of the old option --stage, and what they are called now.
OLD_STAGES = {"precompute": "reference", "train": "dpo", "all": None}


def stage(config: Config, options: argparse.Namespace) -> int:
    from dpo_mlx.stages.train_dpo import train_dpo
    from dpo_mlx.training.preflight import preflight
    from dpo_mlx.training.setup import prepare

    cli.warn_without_blas()
    only = options.only
    if options.stage:
        only = OLD_STAGES[options.stage]
        advice = f"use --only {only}" if only else "leave it out"
        print(f"10: --stage {options.stage} is the old spelling; {advice}", file=sys.stderr)
    if options.check:
        preflight(prepare(config))
        return 0
    return 0 if train_dpo(config, only) else STOPPED


def main() -> None:
    parser = cli.parser(__doc__)
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--only",
        choices=("reference", "dpo"),
        help="do only this part: compute the reference (and SFT before it), or train with it",
    )
    part.add_argument("--stage", choices=OLD_STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="print what a run would do, and stop")
    cli.main(stage, parser)


if __name__ == "__main__":
    main()
