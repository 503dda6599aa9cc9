#!/usr/bin/env python3
"""Fuse the adapters into the base model, and measure how much of their effect is kept."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_mlx import cli
from dpo_mlx.config import Config


def stage(config: Config, options: argparse.Namespace) -> None:
    from dpo_mlx.stages.fuse_adapters import fuse_adapters

    cli.warn_without_blas()
    fuse_adapters(config)


if __name__ == "__main__":
    cli.main(stage, cli.parser(__doc__))
