#!/usr/bin/env python3
"""Ask the base and the fused model held-out questions, compare the answers, and write the report.

Exits 1 when the fused model crosses a limit of the config.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config


def stage(config: Config, options: argparse.Namespace) -> int:
    from dpo_mlx.stages.evaluate import evaluate

    cli.warn_without_blas()
    return 0 if evaluate(config) else 1


if __name__ == "__main__":
    cli.main(stage, cli.parser(__doc__))
