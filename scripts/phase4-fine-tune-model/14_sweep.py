#!/usr/bin/env python3
r"""Train every combination of some settings, and compare the runs in one table.

    .venv/bin/python scripts/phase4-fine-tune-model/14_sweep.py --config C \
        --grid dpo.beta=0.05,0.1 --grid train.learning_rate=1e-6,5e-6
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config


def stage(config: Config, options: argparse.Namespace) -> int:
    from dpo_mlx.stages.sweep import combinations, command, sweep, winner

    cli.warn_without_blas()
    runs = combinations(options.config, options.overrides, options.grid)
    best = winner(sweep(config, runs))
    if best is None:
        print("14: no run reached its end; the reasons are above", file=sys.stderr)
        return 1
    print(f"14: to fuse and test the best run:\n{command(best, options.config, options.overrides)}")
    return 0


def main() -> None:
    parser = cli.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="SECTION.KEY=VALUE,VALUE",
        help="the values of one setting; repeat --grid to combine several settings",
    )
    cli.main(stage, parser)


if __name__ == "__main__":
    main()
