#!/usr/bin/env python3
"""Make preference pairs: your answer is chosen, the base model's answer is rejected."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config


def stage(config: Config, options: argparse.Namespace) -> None:
    from dpo_mlx.stages.make_pairs import make_pairs

    cli.warn_without_blas()
    make_pairs(config)


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--limit",
        dest="overrides",
        action="append",
        type=lambda number: f"data.limit={number}",
        metavar="N",
        help="the same as --set data.limit=N",
    )
    cli.main(stage, parser)


if __name__ == "__main__":
    main()
